"""A policy's answers to questions: the one loop behind benchmarks and held-out evaluation.

    answer       samples G completions of every question, a batch at a time
    ahead        draws from an iterator before its items are needed
    in_batches   a batch at a time, halved when it does not fit in memory

Letters in shapes: G completions of a question.
"""

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from data import Prompter, Question
from files import UserError
from model import ranks
from model.packing import Group
from model.policy import Policy
from records import Record, printable
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

    `asked` holds (record, record whose clip is shown, seed of its sampling). G completions of each
    are sampled as cfg says; temperature 0 is greedy. One thread decodes the clips ahead. Questions
    whose clip cannot be read are skipped and reported on stderr.
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
    finally:  # an error must not wait for clips that nobody needs any more
        thread.shutdown(cancel_futures=True)
        bar.close()


def ahead(items: Iterable, depth: int) -> Iterator:
    """The items, in order, each drawn from its source `depth` items before it is needed."""
    drawn = deque()
    for item in items:
        drawn.append(item)
        if len(drawn) > depth:
            yield drawn.popleft()
    yield from drawn


def in_batches(
    items: Iterable, work: Callable[[list], list[Group]], batch_size: int
) -> Iterator[Group]:
    """The groups that `work` makes of all items, `batch_size` at a time, in order.

    A batch that does not fit in memory is halved, and those after it stay as small. Raises
    UserError if one item alone does not fit.
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
                "one question alone does not fit in memory; lower --max_pixels, --max_frames or "
                "--max_completion_length"
            )
        else:  # not inside `except`, where the failed batch's tensors are still alive
            batch_size = len(batch) // 2
            tqdm.write(f"out of memory: {batch_size} questions at a time from here", sys.stderr)
            torch.cuda.empty_cache()
