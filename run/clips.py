"""Prefetches the questions of each step: clips are decoded while earlier steps still run."""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor

from data import Prompter, Question, step_records
from model import ranks
from records import Record
from run.answers import ahead
from run.config import Config
from run.decoder import ClipReader
from run.log import RunLog
from video import Clip, VideoError


class QuestionsAhead:
    """This rank's questions for each step, prepared a few steps ahead of the loop.

    Questions with unreadable clips are skipped, reported and counted, never replaced. A step's
    questions depend only on (seed, step), and each question's sampling seed also on its slot in the
    step, so a skipped question does not affect the others.
    """

    STEPS_AHEAD = 2

    def __init__(
        self, cfg: Config, records: list[Record], prompter: Prompter, log: RunLog, first_step: int
    ):
        self.cfg, self.records, self.log = cfg, records, log
        self.reader = ClipReader(cfg.clip_timeout)
        self.prompter = dataclasses.replace(prompter, load_clip=self._load_clip)
        self.kept: dict[tuple, Clip] = {}  # by the arguments of load_clip
        self.room = cfg.clip_cache_gb * 1e9  # bytes
        self.threads = ThreadPoolExecutor(max(1, cfg.dataloader_num_workers))
        steps = map(self._submit, range(first_step, cfg.max_steps + 1))
        self.submitted = ahead(steps, self.STEPS_AHEAD if cfg.dataloader_num_workers else 0)

    def _load_clip(self, *arguments) -> Clip:
        """A cached clip, or one decoded now and cached if there is room. There is no eviction: in
        shuffled epochs, no clip is more likely to come next than any other."""
        clip = self.kept.get(arguments)
        if clip is None:
            clip = self.reader.load_clip(*arguments)
            size = clip.frames.nbytes
            # Two threads may decode one clip at once.
            if size <= self.room and self.kept.setdefault(arguments, clip) is clip:
                self.room -= size
        return clip

    def _submit(self, step: int) -> list[tuple[int, Record, Future]]:
        """Slot, record and question (a future) of each of this rank's questions in the step."""
        mine = self.cfg.per_device_train_batch_size * self.cfg.gradient_accumulation_steps
        chosen = step_records(self.records, step - 1, mine * ranks.world(), self.cfg.seed)
        first = ranks.rank() * mine
        slots = range(first, first + mine)
        return [(k, chosen[k], self.threads.submit(self.prompter, chosen[k])) for k in slots]

    def take(self, step: int) -> tuple[list[Question], list[tuple[int, ...]]]:
        """The questions of `step`, which must be the next one, and their sampling seeds."""
        questions, seeds, asked = [], [], next(self.submitted)
        for slot, record, question in asked:
            try:
                questions.append(question.result())
                seeds.append((self.cfg.seed, step, slot, 1))  # 1: the training stream
            except VideoError as error:
                self.log.note(str(record.video), f"skipped question {record.id}: {error}")
        mine = (len(asked), len(asked) - len(questions))
        asked, skipped = (sum(values) for values in zip(*ranks.gather(mine), strict=True))
        self.log.counts["asked"] += asked
        self.log.counts["skipped"] += skipped
        return questions, seeds

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.reader.close()
