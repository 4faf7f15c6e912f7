"""The questions of each step, their clips decoded while the steps before are still at work."""

from collections import deque

from data import Prompter, Question, step_records
from model import ranks
from records import Record
from run.decoder import ClipWorkers
from run.log import RunLog
from video import VideoError


class QuestionsAhead:
    """This rank's questions of each step, their clips decoded a few steps ahead of the loop.

    A question whose clip cannot be read is skipped, reported and counted; no other clip takes its
    place. A step's questions are fixed by (seed, step), and the seed of a question's sampling
    by its place in the step, so everything else stays as it was.
    """

    STEPS_AHEAD = 2

    def __init__(
        self, cfg, records: list[Record], prompter: Prompter, log: RunLog, first_step: int
    ):
        self.cfg, self.records, self.prompter, self.log = cfg, records, prompter, log
        self.workers = ClipWorkers(max(1, cfg.dataloader_num_workers), cfg.clip_timeout)
        self.next_step, self.submitted = first_step, deque()

    def _submit(self, step: int) -> None:
        mine = self.cfg.per_device_train_batch_size * self.cfg.gradient_accumulation_steps
        chosen = step_records(self.records, step - 1, mine * ranks.world(), self.cfg.seed)
        first = ranks.rank() * mine
        slots = range(first, first + mine)
        self.submitted.append(
            [(k, chosen[k], self.workers.submit(*self.prompter.clip_arguments(chosen[k])))
             for k in slots]
        )  # fmt: skip

    def take(self, step: int) -> tuple[list[Question], list[tuple[int, ...]]]:
        ahead = self.STEPS_AHEAD if self.cfg.dataloader_num_workers else 0
        while self.next_step <= min(step + ahead, self.cfg.max_steps):
            self._submit(self.next_step)
            self.next_step += 1
        questions, seeds, asked = [], [], self.submitted.popleft()
        for slot, record, clip in asked:
            try:
                questions.append(self.prompter.question(record, clip.result()))
                seeds.append((self.cfg.seed, step, slot, 1))  # 1: no other stream ends so
            except VideoError as error:
                self.log.note(str(record.video), f"skipped question {record.id}: {error}")
        mine = (len(asked), len(asked) - len(questions))
        asked, skipped = (sum(values) for values in zip(*ranks.gather(mine), strict=True))
        self.log.asked += asked
        self.log.skipped += skipped
        self.log.trained += asked - skipped
        return questions, seeds

    def close(self) -> None:
        self.workers.close()
