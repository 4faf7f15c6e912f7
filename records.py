"""Reads video questions from six dataset formats into one record type.

    read_rows      a JSON list or JSONL file -> its rows, with their locations
    as_record      one row -> Record, or the reason why not
    load_records   file -> [Record]; reports every bad row with file, row and reason

The formats, recognised by their keys (listed: where the text, the answer and the clip are):
    clevrer      problem with lettered lines, solution, video            TW-GRPO's training files
    video-r1     problem, options [or none], solution, video or path     MMVU, MVBench and others
    nextgqa      question, options "(A) ..", answer "(C)", video         NExT-GQA as published
    star         question, options without letters, solution, video      cut from Video-R1-260k
    dvd          problem, solution with a number, video_filename         DVD-counting, JSONL
    clevrer raw  scenes with questions and choices                       for tools/convert.py

Nothing in a file is trusted: a bad row is reported in a sentence, never with a traceback.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from files import UserError, json_lines, parse_json
from rewards import answer_set, number, tagged_answer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_TEXT = 100_000  # characters of a question or an option; longer than any prompt
CLIP_KEYS = ("video", "path", "video_filename")
KINDS = ("multiple choice", "numerical", "regression", "OCR", "free-form")  # as in Video-R1


@dataclass(frozen=True)
class Record:
    id: str  # the row's "id", "question_id" or "problem_id", else its number
    problem: str  # the question, with its lettered options if the file has them in the text
    solution: str  # "<answer>A,C</answer>"
    video: Path
    options: tuple[str, ...] = ()  # lettered ("A. red"), if they are not in `problem`
    kind: str = ""  # one of KINDS
    row: dict = field(default_factory=dict, compare=False, repr=False)  # as in the file

    @property
    def text(self) -> str:
        """The question as every prompt shows it, with separate options after the problem.

        In the format of the general benchmarks' evaluators (eval_general_videor1.py): no line break
        before "Options:", one after each option.
        """
        if not self.options:
            return self.problem
        return self.problem + "Options:\n" + "".join(option + "\n" for option in self.options)


# -------------------------------------------------------------------------------------------- files


def read_rows(path: Path, errors: list[str]) -> Iterator[tuple[str, object]]:
    """Yields ("row 3", object) from a JSON list, ("line 3", object) from JSONL.

    Lines that are not JSON are added to `errors`; an unreadable file raises UserError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"{path}: cannot be read ({reason})") from None
    if text.lstrip().startswith("["):
        try:
            rows = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: is not valid JSON ({str(error)[:200]})") from None
        yield from ((f"row {k}", row) for k, row in enumerate(rows, 1))
        return
    for k, row in json_lines(text.encode()):
        if isinstance(row, Exception):
            reason = str(row)[:200].replace("line 1 column", "column")
            errors.append(f"line {k}: is not valid JSON ({reason})")
        else:
            yield f"line {k}", row


def read_records(path: str | Path, video_root: str | Path = "") -> tuple[list[Record], list[str]]:
    """(good records, one sentence per bad row). Raises UserError if the file cannot be read at
    all."""
    records, errors = [], []
    for where, row in read_rows(Path(path), errors):
        try:
            records.append(as_record(row, where, Path(video_root)))
        except ValueError as error:
            errors.append(f"{where}: {error}")
    return records, errors


def refuse(path: str | Path, what: str, errors: list[str]) -> None:
    """Raises UserError listing the first ten `errors`, if there are any."""
    if errors:
        more = [f"... and {len(errors) - 10} more"] if len(errors) > 10 else []
        raise UserError("\n  ".join([f"{path}: {len(errors)} {what}:", *errors[:10], *more]))


def load_records(path: str | Path, video_root: str | Path = "") -> list[Record]:
    """All records of a file, their video paths joined to `video_root`.

    Raises UserError listing the bad rows. Does not look at the clips; that happens when one is
    needed, or in `python -m tools.check`.
    """
    records, errors = read_records(path, video_root)
    refuse(path, "bad row(s)", errors)
    if not records:
        raise UserError(f"{path}: contains no records")
    return records


# --------------------------------------------------------------------------------------------- rows


def as_record(row: object, where: str, root: Path) -> Record:
    """One row of any format. Raises ValueError saying what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, not an object with problem, solution and video")
    if isinstance(row.get("questions"), list):
        raise ValueError("is a raw CLEVRER scene; first run: python -m tools.convert clevrer")
    if row.get("data_type", "video") not in ("video", "frame"):  # "frame": TV-QA in MVBench
        raise ValueError(f"is about a {short(row['data_type'])}; only videos can be shown")
    problem, solution = _text(row, "problem", "question"), _solution(row)
    video = join_video(root, _text(row, *CLIP_KEYS))
    texts = option_texts(row.get("options"))
    in_problem = option_letters(problem)
    options = tuple(
        given if given.startswith(f"{a}.") else f"{a}. {text}"
        for a, given, text in zip(LETTERS, row.get("options") or [], texts, strict=False)
    )
    kind = _kind(row, solution, bool(options or in_problem))
    letters = set(LETTERS[: len(options)]) or in_problem
    if kind == "multiple choice" and letters and not answer_set(solution) <= letters:
        raise ValueError(
            f"the answer {short(tagged_answer(solution))} matches no option; "
            f"the options are {', '.join(sorted(letters))}"
        )
    ids = (str(row[k])[:200] for k in ("id", "question_id", "problem_id") if k in row)
    apart = options if len(in_problem) != len(options) else ()
    return Record(next(ids, where), problem, solution, video, apart, kind, row)


def _text(row: dict, *keys: str) -> str:
    """The value of the first of `keys` in the row, which must be a non-empty string."""
    key = next((k for k in keys if row.get(k) is not None), keys[0])
    value = row.get(key)
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT:
        raise ValueError(f"needs {key!r}, a string of 1 to {MAX_TEXT:,} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"has a lone surrogate (half a character) in {key!r}") from None
    return value


def _solution(row: dict) -> str:
    """ "<answer>A,C</answer>"; NExT-GQA's "(A),(C)" is converted to that form."""
    answer = _text(row, "solution", "answer")
    if row.get("solution") is not None:
        return answer
    if re.fullmatch(r"\([A-Z]\)(,\([A-Z]\))*", answer.strip()):
        answer = re.sub("[() ]", "", answer)
    return f"<answer>{answer}</answer>"


def option_texts(options: object) -> list[str]:
    """The options without their letters: ["(A) red", "(B) blue"], ["A. red", "B. blue"] and ["red",
    "blue"] all give ["red", "blue"].

    Raises ValueError if they are not a list of strings. Only letters in order A, B, C, ... count.
    """
    if options is None:
        return []
    if not isinstance(options, list) or len(options) > len(LETTERS):
        raise ValueError("has 'options' that are not a list of at most 26 strings")
    for option in options:
        _text({"options": option}, "options")
    lettered = [re.match(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])(?:\s+|$)", o) for o in options]
    found = [m and (m[1] or m[2]) for m in lettered]
    if found == list(LETTERS[: len(options)]):
        return [o[m.end() :] for o, m in zip(options, lettered, strict=True)]
    return list(options)


def option_letters(problem: str) -> set[str]:
    """The option letters in lines "A. red", "A) red" or "A red" of a question; none if they are not
    A, B, C, ... in order."""
    found = re.findall(r"^[ \t]*\(?([A-Z])[.):]?[ \t]", problem, re.MULTILINE)
    runs = len(found) >= 2 and found == list(LETTERS[: len(found)])
    return set(found) if runs else set()


def _kind(row: dict, solution: str, has_options: bool) -> str:
    """The row's own problem type, else inferred from its options and answer."""
    if kind := row.get("problem_type"):
        if kind not in KINDS:
            raise ValueError(f"has problem_type {short(kind)}; known are {', '.join(KINDS)}")
        return kind
    if has_options:
        return "multiple choice"
    if number(tagged_answer(solution)) is not None:
        return "numerical"
    is_letters = all(len(part) == 1 and part in LETTERS for part in answer_set(solution))
    return "multiple choice" if is_letters else "free-form"


# -------------------------------------------------------------------------------------------- paths


def join_video(root: Path, name: str) -> Path:
    """root/name, with leading "/" and "./" stripped from `name`.

    Raises ValueError if the result lies outside the root, through ".." or a symbolic link: a
    dataset must not decide which files of this machine are read.
    """
    path, real_root = root / re.sub(r"^(\./|/)+", "", name.strip()), os.path.realpath(root)
    real_path = os.path.realpath(path)
    if real_path == real_root:
        raise ValueError(f"has the video path {short(name)}, which names no file")
    if os.path.commonpath([real_root, real_path]) != real_root:
        raise ValueError(
            f"has the video path {short(name)}, which leaves --video_root by '..' or a symbolic "
            "link; give a directory that holds all clips"
        )
    return path


def short(value: object, length: int = 80) -> str:
    """A value for use in a message: the repr of a string, truncated to `length` characters, or of
    the type name of any other value."""
    text = value if isinstance(value, str) else type(value).__name__
    return repr(text if len(text) <= length else text[:length] + "...")
