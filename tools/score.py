"""Writes evaluation logs row by row, and scores them: this project's and the official ones.

    append       adds a row to a log, which the ranks of a run share
    resume       the questions that a killed run has answered
    read_log     JSONL of answered questions -> Log: one Answer per question, duplicates set aside
    accuracy     mean of some scores, with its 95 % interval
    table        several logs side by side, for a terminal or a Markdown document

A row is {"question": {the dataset's row}, "ground_truth", "model_output", ...}. Its accuracy is
recomputed from model_output and compared with the logged one, if any. Soft accuracy is
`rewards.compare_answers`; strict accuracy counts only fully right answers.

OFFICIAL (src/eval/*.py): the CLEVRER evaluator's "overall" covers only its last batch; a resumed
run repeats rows (the Video-MME zero-shot log has 2,748 for 2,700 questions).
OURS: all questions, but only the first row of each.

Shape letters: Q questions, R resamples.
"""

import fcntl
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import files
from files import UserError, printable
from records import read_rows
from rewards import compare_answers, extract_answer, number, strict_format_reward, tagged_answer

_LETTERS = re.compile(r"[A-Z](?:\s*,\s*[A-Z])*,?")


@dataclass
class Answer:
    """One question of a log, scored."""

    key: str  # the same for every row about this question
    text: str
    soft: float
    form: float  # 1 if the output is in the strict format, else 0
    is_multi: bool  # several right answers: a comma in the truth, as in the official code
    fits: bool  # the text has a valid form
    agrees: bool  # the logged accuracy is the same, or missing


@dataclass
class Log:
    path: Path
    answers: list[Answer] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)  # the location of every repeated row
    errors: list[str] = field(default_factory=list)  # one sentence per bad row


def question_key(row: object) -> str:
    """Identifies a question: the dataset's whole row."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)


def read_log(path: str | Path) -> Log:
    """Raises UserError if no row of the file can be scored."""
    log, seen = Log(Path(path)), set()
    for where, row in read_rows(log.path, log.errors):
        try:
            answer = score_row(row, where)
        except ValueError as error:
            log.errors.append(f"{where}: {error}")
            continue
        if answer.key in seen:
            log.duplicates.append(where)
        else:
            log.answers.append(answer)
        seen.add(answer.key)
    if not log.answers:
        why = log.errors[0] if log.errors else "it is empty"
        raise UserError(f"{path}: holds no row of an evaluation log ({why})")
    return log


def score_row(row: object, where: str) -> Answer:
    """Raises ValueError if the row has no output or no truth."""
    row = row if isinstance(row, dict) else {}
    output, truth = row.get("model_output"), row.get("ground_truth")
    if not isinstance(output, str) or not isinstance(truth, str) or not truth.strip():
        raise ValueError("needs 'model_output' and 'ground_truth', two strings")
    # The general zero-shot evaluator compares the whole output, and logs it as "extracted_answer".
    text, truth = output.strip(), tagged_answer(truth)
    if row.get("extracted_answer") != text:
        text = extract_answer(output)
    soft, logged = compare_answers(text, truth), row.get("accuracy_score")
    is_choice, fits = _LETTERS.fullmatch(truth) is not None, text != ""
    if is_choice:
        fits = _LETTERS.fullmatch(text) is not None
    elif number(truth) is not None:
        fits = number(text) is not None
    return Answer(
        key=question_key(where if row.get("question") is None else row["question"]),
        text=text,
        soft=soft,
        form=strict_format_reward(output),
        is_multi=is_choice and "," in truth,
        fits=fits,
        agrees=not isinstance(logged, int | float) or abs(logged - soft) < 1e-6,
    )


# ----------------------------------------------------------------------------------- a log to write


def append(path: str, row: dict) -> None:
    """Appends a row to a log that several ranks may write to; kill -9 loses at most this row.
    Raises OSError if it cannot be written, leaving the log as it was."""
    line = (json.dumps(row) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed; other ranks wait
        size = os.path.getsize(path)
        try:
            while line:  # write may be partial, and reports the reason only on the next call
                line = line[file.write(line) :]
        except OSError as error:
            os.truncate(path, size)  # or the next row would continue this one
            raise OSError(error.errno, error.strerror, path) from None


def resume(path: str, settings: dict) -> set[str]:
    """Removes a log's unfinished last row and returns the keys of the answered questions.

    Raises UserError or OSError, leaving the file unchanged, if it cannot be read or is not the log
    of a run with these settings, which each row holds under "run".
    """
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        data = file.read()
        whole, rows = data[: data.rfind(b"\n") + 1], list(files.json_lines(data))
        if data[len(whole) :].startswith(b'{"question": ') and isinstance(rows[-1][1], Exception):
            rows.pop()  # it was being written when the run was killed
        for k, row in rows:
            place = f"--out {path}: line {k}"
            if not isinstance(row, dict) or not isinstance(row.get("run"), dict):
                raise UserError(f"{place} is not a row of eval.py run; choose another file")
            if changed := [name for name in settings if row["run"].get(name) != settings[name]]:
                another = ", ".join(changed)
                raise UserError(f"{place} was made with another {another}; choose another file")
        file.truncate(len(whole))
    return {question_key(row.get("question")) for _, row in files.json_lines(whole)}


# ------------------------------------------------------------------------------------------ numbers


def accuracy(scores_Q: np.ndarray, resamples: int = 1000) -> tuple[float, float, float]:
    """The mean and its 95 % percentile bootstrap interval, in percent: Q questions resampled R
    times.

    Only the counts of distinct values matter, so a resample is one multinomial draw over them: the
    same distribution, thousands of times faster than drawing questions.
    """
    values, counts = np.unique(scores_Q, return_counts=True)
    total = len(scores_Q)
    draws = np.random.default_rng(0).multinomial(total, counts / total, size=resamples)
    low, high = np.percentile(draws @ values / total, [2.5, 97.5])
    return 100 * float(scores_Q.mean()), 100 * float(low), 100 * float(high)


def parts(log: Log) -> dict[str, np.ndarray]:
    """The soft scores (Q,) of all questions, and of those with one and with several right
    answers."""
    groups = {
        "overall": log.answers,
        "single": [a for a in log.answers if not a.is_multi],
        "multi": [a for a in log.answers if a.is_multi],
    }
    return {name: np.array([a.soft for a in group]) for name, group in groups.items() if group}


# ------------------------------------------------------------------------------------------ a table


def table(logs: list[Log]) -> str:
    """A Markdown table with a line for each part of each log, followed by notes on the logs."""
    rows = [("log", "part", "questions", "strict", "95 % interval", "soft", "95 % interval")]
    rows.append(("---",) * 7)
    scored = [(log, parts(log)) for log in logs]
    for part in dict.fromkeys(part for _, scores in scored for part in scores):
        for log, scores in scored:
            if part in scores:
                soft_Q = scores[part]
                name = printable(log.path.stem).replace("|", "\\|")
                cells = [name, part, f"{len(soft_Q):9}"]
                for mean, low, high in (accuracy(soft_Q == 1), accuracy(soft_Q)):
                    cells += [f"{mean:6.2f}", f"{low:5.1f} to {high:5.1f}"]
                rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([*lines, *map(notes, logs)])


def notes(log: Log) -> str:
    """Format rate, and counts of odd rows with the first five of each kind."""
    form = 100 * np.mean([a.form for a in log.answers])
    lines = [f"\n{printable(log.path.name)}: format rate {form:.2f}"]
    for what, odd in {
        "answers that fit no rule": [repr(a.text)[:100] for a in log.answers if not a.fits],
        "duplicate rows, counted once": log.duplicates,
        "bad rows, not counted": log.errors,
        "rows whose logged accuracy_score differs": [
            repr(a.text)[:100] for a in log.answers if not a.agrees
        ],
    }.items():
        examples = f" ({'; '.join(odd[:5])})" if odd else ""
        lines.append(f"- {what}: {len(odd)}{examples}")
    return "\n".join(lines)
