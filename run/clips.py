"""The questions of each step, their clips decoded while earlier steps still run."""

from concurrent.futures import Future

from data import Prompter, Question, step_records
from model import ranks
from records import Record
from run.answers import ahead
from run.config import Config
from run.decoder import ClipWorkers
from run.log import RunLog
from video import Clip, VideoError


class QuestionsAhead:
    """This rank's questions of each step, their clips decoded a few steps ahead of the loop.

    A question whose clip cannot be read is skipped, reported and counted; nothing is substituted
    for it. (seed, step) determine a step's questions, and the place in the step the seed of a
    question's sampling, so the other questions are sampled as if nothing were missing.
    """

    STEPS_AHEAD = 2

    def __init__(
        self, cfg: Config, records: list[Record], prompter: Prompter, log: RunLog, first_step: int
    ):
        self.cfg, self.records, self.prompter, self.log = cfg, records, prompter, log
        self.workers = ClipWorkers(max(1, cfg.dataloader_num_workers), cfg.clip_timeout)
        self.kept: dict[tuple, Clip] = {}  # by the arguments of load_clip
        self.room = cfg.clip_cache_gb * 1e9  # bytes
        steps = map(self._submit, range(first_step, cfg.max_steps + 1))
        self.submitted = ahead(steps, self.STEPS_AHEAD if cfg.dataloader_num_workers else 0)

    def _submit(self, step: int) -> list[tuple[int, Record, Future]]:
        """The places of this rank's questions in the step, their records and their clips."""
        mine = self.cfg.per_device_train_batch_size * self.cfg.gradient_accumulation_steps
        chosen = step_records(self.records, step - 1, mine * ranks.world(), self.cfg.seed)
        first = ranks.rank() * mine
        slots = range(first, first + mine)
        return [(k, chosen[k], self._clip(chosen[k])) for k in slots]

    def _clip(self, record: Record) -> Future:
        """The clip of a record: kept from an earlier epoch, or decoded now."""
        arguments = self.prompter.clip_arguments(record)
        if arguments not in self.kept:
            return self.workers.submit(*arguments)
        future = Future()
        future.set_result(self.kept[arguments])
        return future

    def _keep(self, record: Record, clip: Clip) -> None:
        """Keeps a clip while there is room. Nothing makes place for another: in shuffled epochs no
        clip is likelier to come next than the rest."""
        arguments = self.prompter.clip_arguments(record)
        if arguments not in self.kept and clip.frames.nbytes <= self.room:
            self.kept[arguments] = clip
            self.room -= clip.frames.nbytes

    def take(self, step: int) -> tuple[list[Question], list[tuple[int, ...]]]:
        """The questions of `step`, the next one, and the seeds of their sampling."""
        questions, seeds, asked = [], [], next(self.submitted)
        for slot, record, clip in asked:
            try:
                questions.append(self.prompter.question(record, clip.result()))
                self._keep(record, clip.result())
                seeds.append((self.cfg.seed, step, slot, 1))  # 1: the stream of training
            except VideoError as error:
                self.log.note(str(record.video), f"skipped question {record.id}: {error}")
        mine = (len(asked), len(asked) - len(questions))
        asked, skipped = (sum(values) for values in zip(*ranks.gather(mine), strict=True))
        self.log.counts["asked"] += asked
        self.log.counts["skipped"] += skipped
        return questions, seeds

    def close(self) -> None:
        self.workers.close()
