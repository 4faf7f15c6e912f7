"""Answers questions with a policy: the loop shared by benchmarks and held-out evaluation.

    answer       samples G completions per question, a batch at a time
    ahead        prefetches from an iterator
    in_batches   runs batches, halving them when out of memory

Shape letters: G completions of a question.
"""

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from data import Prompter, Question
from files import UserError, printable
from model import ranks
from model.packing import Group
from model.policy import Policy
from records import Record
from run.config import Config
from video import VideoError


@torch.no_grad()
def answer(
    cfg: Config,
    policy: Policy,
    prompter: Prompter,
    asked: list[tuple[Record, Record, tuple[int, ...]]],
    batch_size: int,
    top_p: float = 1.0,
    label: str = "answering",
) -> Iterator[Group]:
    """Yields the group of each question, in order.

    `asked` holds (record, record whose clip is shown, sampling seed). Samples G completions of each
    with the settings in cfg; temperature 0 is greedy. One thread prefetches clips. Questions with
    unreadable clips are skipped and reported on stderr.
    """
    bar = tqdm(total=len(asked), desc=label, leave=False, disable=not ranks.is_main())

    def read(record: Record, clip_of: Record, seed: tuple[int, ...]):
        try:
            return prompter(record, clip_of), seed
        except VideoError as error:
            tqdm.write(printable(f"skipped question {record.id}: {error}"), file=sys.stderr)
            bar.update()

    def sample(batch: list[tuple[Question, tuple[int, ...]]]) -> list[Group]:
        questions, seeds = map(list, zip(*batch, strict=True))
        features = policy.encode_videos(questions)
        G, length = cfg.num_generations, cfg.max_completion_length
        return policy.rollout(questions, features, G, length, cfg.temperature, seeds, top_p)

    thread = ThreadPoolExecutor(1)
    try:
        futures = ahead((thread.submit(read, *one) for one in asked), batch_size)
        readable = (one for future in futures if (one := future.result()))
        for group in in_batches(readable, sample, batch_size):
            yield group
            bar.update()
    finally:  # after an error, do not wait for clips that are no longer needed
        thread.shutdown(cancel_futures=True)
        bar.close()


def ahead(items: Iterable, depth: int) -> Iterator:
    """The items in order, each drawn from its source `depth` items before it is needed."""
    drawn = deque()
    for item in items:
        drawn.append(item)
        if len(drawn) > depth:
            yield drawn.popleft()
    yield from drawn


def in_batches(
    items: Iterable, work: Callable[[list], list[Group]], batch_size: int
) -> Iterator[Group]:
    """Applies `work` to all items, `batch_size` at a time, and yields the groups in order.

    If a batch does not fit in memory, it and all later batches are halved. Raises UserError if a
    single item does not fit.
    """
    source, waiting = iter(items), []
    while waiting := waiting + list(itertools.islice(source, max(0, batch_size - len(waiting)))):
        batch, groups = waiting[:batch_size], None
        try:
            groups = work(batch)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
        if groups is not None:
            waiting = waiting[len(batch) :]
            yield from groups
        elif len(batch) == 1:
            raise UserError(
                "a single question does not fit in memory; lower --max_pixels, --max_frames or "
                "--max_completion_length"
            )
        else:  # not inside `except`, which keeps the failed batch's tensors alive
            batch_size = len(batch) // 2
            tqdm.write(f"out of memory: {batch_size} questions at a time from here", sys.stderr)
            torch.cuda.empty_cache()
