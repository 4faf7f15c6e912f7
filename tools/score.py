"""Evaluation logs, this project's and the official ones: written a row at a time, and scored.

    open_log     the log of a run, locked for its ranks; a killed run is resumed in it
    read_log     JSONL of answered questions -> Log: one Answer per question, duplicates set aside
    summarize    Log -> accuracy with 95 % intervals: overall, single, multi, by task
    report, markdown    the same as text, and as one table of several logs

A row is {"question": {the dataset's row}, "ground_truth", "model_output", ...}. Its accuracy is
recomputed from model_output, and compared with the logged one if there is one. Soft accuracy is
`rewards.compare_answers`; strict accuracy counts only fully right answers.

OFFICIAL (src/eval/*.py): "overall" of the CLEVRER evaluator covers its last batch only; a resumed
run repeats rows (the Video-MME zero-shot log has 2,748 for 2,700 questions).
OURS: all rows, but only the first row of each question.

Letters in shapes: Q questions, R resamples.
"""

import contextlib
import fcntl
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import files
from files import UserError
from model import ranks
from records import printable, read_rows, task_of
from rewards import compare_answers, extract_answer, number, strict_format_reward, tagged_answer

_LETTERS = re.compile(r"[A-Z](?:\s*,\s*[A-Z])*,?")
MANY_TASKS = 40  # a breakdown into more is not shown


@dataclass
class Answer:
    """One question of a log, scored."""

    name: str  # its id
    soft: float
    form: float  # 1 if the output is in the strict format, else 0
    answer: str
    is_multi: bool  # several right answers: a comma in the truth, as in the official code
    task: str
    fits: bool  # the answer has a form that could be right
    agrees: bool  # the logged accuracy is the same, or there is none


@dataclass
class Log:
    path: Path
    answers: list[Answer]
    duplicates: list[str] = field(default_factory=list)  # the id of every repeated row
    errors: list[str] = field(default_factory=list)  # a sentence for every bad row


def question_key(row: object) -> str:
    """What makes two rows the same question: the dataset's whole row."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)


def read_log(path: str | Path) -> Log:
    """Raises UserError if no row of the file can be scored."""
    path = Path(path)
    log, seen = Log(path, []), set()
    for where, row in read_rows(path, log.errors):
        try:
            answer, key = score_row(row, where)
        except ValueError as error:
            log.errors.append(f"{where}: {error}")
            continue
        if key in seen:
            log.duplicates.append(answer.name)
        else:
            seen.add(key)
            log.answers.append(answer)
    if not log.answers:
        first = f"; {log.errors[0]}" if log.errors else ""
        raise UserError(
            f"{path}: holds no row that can be scored; expected an evaluation log, JSONL of "
            f'{{"question", "ground_truth", "model_output"}}{first}'
        )
    return log


def score_row(row: object, where: str) -> tuple[Answer, str]:
    """(the scored answer, the key of its question). Raises ValueError if the row has none."""
    if not isinstance(row, dict) or not isinstance(row.get("model_output"), str):
        raise ValueError("needs 'model_output', a text")
    question = row.get("question")
    facts = question if isinstance(question, dict) else {}
    truth = row.get("ground_truth", facts.get("solution"))
    if not isinstance(truth, str) or not truth.strip():
        raise ValueError("needs 'ground_truth', a text that is not empty")
    truth, answer = tagged_answer(truth), answer_of(row)
    soft, logged = compare_answers(answer, truth), row.get("accuracy_score")
    ids = (facts.get(k) for k in ("id", "question_id", "problem_id"))
    is_number = number(truth) is not None
    is_choice = not is_number and _LETTERS.fullmatch(truth) is not None
    fits = bool(answer)
    if is_number:
        fits = number(answer) is not None
    elif is_choice:
        fits = _LETTERS.fullmatch(answer) is not None
    scored = Answer(
        name=next((str(i)[:80] for i in ids if i is not None), where),
        soft=soft,
        form=strict_format_reward(row["model_output"]),
        answer=answer,
        is_multi=is_choice and "," in truth,
        task=task_of(facts),
        fits=fits,
        agrees=not isinstance(logged, int | float) or abs(logged - soft) < 1e-6,
    )
    return scored, question_key(question if question is not None else [where])


def answer_of(row: dict) -> str:
    """The answer by the rule of the evaluator that wrote the row.

    The general zero-shot evaluator compares the whole output, and then logs it as the
    "extracted_answer"; all others compare `rewards.extract_answer` of it.
    """
    output = row["model_output"]
    whole = output.strip()
    return whole if row.get("extracted_answer") == whole else extract_answer(output)


# ----------------------------------------------------------------------------------- a log to write


class RowLog:
    """The JSONL log of a run. All its ranks append to it, and kill -9 loses at most one row."""

    def __init__(self, path: str, settings: dict, done: set[str]):
        self.path, self.settings, self.done = path, settings, done
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, row: dict) -> None:
        """Raises UserError if the row does not fit on the disk; the log is then as it was."""
        text = json.dumps(row | {"run": self.settings}, ensure_ascii=False) + "\n"
        rest = text.encode(errors="backslashreplace")  # half a character, as JSON spells it
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        try:
            before = os.fstat(self.descriptor).st_size
            while rest:  # a disk that is nearly full takes a part, and then refuses
                rest = rest[os.write(self.descriptor, rest) :]
        except OSError as error:
            os.ftruncate(self.descriptor, before)
            raise UserError(
                f"--out {self.path}: cannot be written ({error.strerror}); its rows are whole, and "
                "the same command resumes it"
            ) from None
        finally:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)


@contextlib.contextmanager
def open_log(path: str, settings: dict) -> Iterator[RowLog]:
    """The log for all ranks of this run, locked against other runs until the block ends.

    Raises UserError on every rank, and leaves the file as it is, if it is another run's.
    """
    real = Path(os.path.realpath(path))
    beside, lock = real.with_name(f".{real.name}.lock"), None

    def take() -> set[str]:
        nonlocal lock
        lock = files.lock(beside)
        if lock is None:
            raise UserError("another eval.py run is writing to it")
        try:
            return mend(real, settings)
        except (UserError, OSError):
            beside.unlink()  # it would lie beside a file that is not ours
            raise

    try:
        try:
            done = ranks.on_first(take)
        except (UserError, OSError) as error:
            raise UserError(f"--out {path}: {getattr(error, 'strerror', None) or error}") from None
        yield RowLog(path, settings, done)
        ranks.barrier()  # the first rank holds the lock for all
    finally:
        if lock is not None:
            os.close(lock)


def mend(path: Path, settings: dict) -> set[str]:
    """Cuts off an unfinished last row, and returns the keys of the answered questions. Raises
    UserError, and changes nothing, if this is not a log of a run with these settings."""
    if path.exists() and not path.is_file():
        raise UserError("is not a file")
    data = path.read_bytes() if path.exists() else b""
    whole, done = data[: data.rfind(b"\n") + 1], set()
    torn = data[len(whole) :]
    for k, row in files.json_lines(data):
        is_last = k > whole.count(b"\n")
        if is_last and isinstance(row, Exception) and torn.startswith(b'{"question": '):
            break
        if not isinstance(row, dict) or not isinstance(row.get("run"), dict):
            raise UserError(f"line {k} is not a row of eval.py run; choose another file")
        changed = [name for name, value in settings.items() if row["run"].get(name) != value]
        if changed:
            raise UserError(
                f"line {k} was made with another {', '.join(changed)}; choose another file"
            )
        if not is_last:
            done.add(question_key(row.get("question")))
    if torn:
        os.truncate(path, len(whole))
    return done


# ------------------------------------------------------------------------------------------ numbers


@dataclass
class Share:
    """An accuracy in percent, with its 95 % bootstrap interval."""

    questions: int
    strict: float
    soft: float
    strict_interval: tuple[float, float]
    soft_interval: tuple[float, float]


@dataclass
class Summary:
    shares: dict[str, Share]  # "overall", "single", "multi", then tasks
    form: float  # percent of the outputs in the strict format
    unfit: Counter  # answers of a form that cannot be right -> how often
    disagreements: int  # rows whose logged accuracy differs


def interval(scores_Q: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean, in percent: Q questions drawn anew, R times.

    Only how often each value occurs matters, so a resample is one multinomial draw over the
    distinct values: the same distribution, thousands of times faster than drawing questions.
    """
    values, counts = np.unique(scores_Q, return_counts=True)
    total = len(scores_Q)
    draws = np.random.default_rng(seed).multinomial(total, counts / total, size=resamples)
    low, high = np.percentile(draws @ values / total, [2.5, 97.5]) * 100
    return float(low), float(high)


def share(answers: list[Answer], resamples: int, seed: int) -> Share:
    soft_Q = np.array([a.soft for a in answers])
    strict_Q = (soft_Q == 1.0).astype(float)
    means = (100 * float(scores_Q.mean()) for scores_Q in (strict_Q, soft_Q))
    intervals = (interval(scores_Q, resamples, seed) for scores_Q in (strict_Q, soft_Q))
    return Share(len(answers), *means, *intervals)


def summarize(log: Log, resamples: int = 1000, seed: int = 0) -> Summary:
    groups = {
        "overall": log.answers,
        "single": [a for a in log.answers if not a.is_multi],
        "multi": [a for a in log.answers if a.is_multi],
    }
    tasks = sorted({a.task for a in log.answers if a.task})
    if 2 <= len(tasks) <= MANY_TASKS:
        groups |= {f"task {t}": [a for a in log.answers if a.task == t] for t in tasks}
    return Summary(
        {name: share(group, resamples, seed) for name, group in groups.items() if group},
        100 * float(np.mean([a.form for a in log.answers])),
        Counter(a.answer for a in log.answers if not a.fits),
        sum(not a.agrees for a in log.answers),
    )


# --------------------------------------------------------------------------------------------- text


def report(log: Log, summary: Summary) -> str:
    lines = [f"{one_line(log.path.name, 200)}: {len(log.answers)} questions"]
    lines.append(f"{'':32} questions   strict [95 %]           soft [95 %]")
    for name, s in summary.shares.items():
        cells = [
            f"{mean:6.2f} [{low:5.1f}, {high:5.1f}]"
            for mean, (low, high) in ((s.strict, s.strict_interval), (s.soft, s.soft_interval))
        ]
        lines.append(f"  {one_line(name, 30):30} {s.questions:9}   {'   '.join(cells)}")
    unfit, repeated = summary.unfit.total(), len(log.duplicates)
    examples = ", ".join(repr(one_line(a, 30)) for a, _ in summary.unfit.most_common(5))
    names = ", ".join([one_line(n, 40) for n in log.duplicates[:10]] + ["..."] * (repeated > 10))
    lines += [
        f"  format rate {summary.form:.2f}",
        f"  answers that fit no rule: {unfit}" + (f" ({examples})" if unfit else ""),
        f"  duplicate rows, counted once: {repeated}" + (f" (questions {names})" if names else ""),
    ]
    if summary.disagreements:
        lines.append(f"  rows whose logged accuracy_score differs: {summary.disagreements}")
    lines += [f"  bad row, not counted: {one_line(error, 200)}" for error in log.errors[:10]]
    if len(log.errors) > 10:
        lines.append(f"  ... and {len(log.errors) - 10} more bad rows")
    return "\n".join(lines)


def markdown(logs: list[tuple[Log, Summary]]) -> str:
    """One table, a line for each log; intervals are of the strict accuracy."""
    lines = [
        "| log | questions | strict | 95 % | soft | single | multi strict | multi soft | format "
        "| fit no rule | duplicates |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for log, summary in logs:
        overall = summary.shares["overall"]
        single, multi = summary.shares.get("single"), summary.shares.get("multi")
        low, high = overall.strict_interval
        name = one_line(log.path.stem, 80).replace("|", "\\|")
        multis = f"{multi.strict:.2f} | {multi.soft:.2f}" if multi else "- | -"
        lines.append(
            f"| {name} | {overall.questions} | {overall.strict:.2f} | {low:.1f} to {high:.1f} "
            f"| {overall.soft:.2f} | {f'{single.strict:.2f}' if single else '-'} | {multis} "
            f"| {summary.form:.1f} | {summary.unfit.total()} | {len(log.duplicates)} |"
        )
    return "\n".join(lines)


def one_line(text: str, length: int) -> str:
    """Text from a file, for a terminal or a table: on one line, cut to `length`."""
    text = text[:length] + ("..." if len(text) > length else "")
    return printable(text).replace("\n", " ")
