"""Questions about videos: records from JSON or JSONL, and the prompt a model sees for each.

    load_records    file -> [Record], every bad row reported with file, row and reason
    Prompter        Record -> Question: prompt, token ids, position ids, patches of its clip
    step_records    which records a training step uses, fixed by (seed, step) alone

Letters in shapes: P prompt tokens, S patches of a clip.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

import video
from rewards import answer_set, tagged_answer


class DataError(Exception):
    """Data that cannot be used. The message names the file and row, or the record, and why."""


@dataclass(frozen=True)
class Record:
    id: str  # its own "id", "question_id" or "problem_id", else the number of the row
    problem: str  # the question with its lettered options
    solution: str  # "<answer>A,C</answer>"
    video: Path


@dataclass
class Question:
    """One record as the model reads it."""

    record: Record
    prompt: str  # rendered, the video as one placeholder
    ids_P: Tensor  # (P,) int64, the placeholder expanded to one id per video token
    positions_3P: Tensor  # (3, P) int64, see video.mrope_positions
    patches: Tensor  # (S, 1176) float32
    grid: tuple[int, int, int]  # (t, h, w) in patches
    seconds: float  # between two frames


# ------------------------------------------------------------------------------------------ records


def load_records(path: str | Path, video_root: str | Path = "") -> list[Record]:
    """Records of a JSON list or a JSONL file with the keys "problem", "solution" and "video".

    Video paths are joined to `video_root`. Whether the clips can be read is found out when they
    are; the rows themselves are all checked first, and DataError lists every bad one (the first ten
    in full).
    """
    path = Path(path)
    records, errors = [], []
    for where, row in _rows(path, errors):
        try:
            records.append(_record(row, where, Path(video_root)))
        except ValueError as error:
            errors.append(f"{where}: {error}")
    if errors:
        more = f"\n  ... and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise DataError(f"{path}: {len(errors)} bad row(s):\n  " + "\n  ".join(errors[:10]) + more)
    if not records:
        raise DataError(f"{path}: holds no records")
    return records


def _rows(path: Path, errors: list[str]):
    """Yields ("row 3", object); what is not JSON goes to `errors`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; --jsonl_path wants a JSON list or JSONL of questions"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}: is not valid JSON ({error})") from None
        yield from ((f"row {k}", row) for k, row in enumerate(rows, 1))
        return
    for k, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {k}", json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            errors.append(f"line {k}: is not valid JSON ({error})")


def _record(row: object, where: str, video_root: Path) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, not an object with problem, solution and video")
    for key in ("problem", "solution", "video"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"needs {key!r}, a text that is not empty")
    letters = option_letters(row["problem"], row.get("options"))
    answers = answer_set(row["solution"])
    if letters and not answers <= letters:
        raise ValueError(
            f"the answer {tagged_answer(row['solution'])!r} names no option; "
            f"the options are {', '.join(sorted(letters))}"
        )
    row_id = next(
        (str(row[key]) for key in ("id", "question_id", "problem_id") if key in row), where
    )
    return Record(row_id, row["problem"], row["solution"], video_root / row["video"])


def option_letters(problem: str, options: object = None) -> set[str]:
    """The letters a choice question offers: from its `options` list, else from lines "A. red", "A)
    red" or "A red".

    Empty when there are none (a question that asks for a number or a text). Lines count only if
    they run A, B, C, ...
    """
    if isinstance(options, list):
        return {chr(ord("A") + k) for k in range(len(options))}
    found = re.findall(r"^[ \t]*\(?([A-Z])[.):]?[ \t]", problem, re.MULTILINE)
    if len(found) >= 2 and found == [chr(ord("A") + k) for k in range(len(found))]:
        return set(found)
    return set()


def select_records(
    records: list[Record], question_type: str, train_samples: int, seed: int
) -> list[Record]:
    """The questions to train on: by number of right answers, then at most `train_samples` of them.

    "single" keeps questions with one right answer, "multiple" those with several, "mixed" all; the
    official loader, too, goes by the comma in the solution. Raises DataError if none is left.
    """
    if question_type != "mixed":
        several = question_type == "multiple"
        records = [r for r in records if ("," in tagged_answer(r.solution)) == several]
    if not records:
        raise DataError(f"--question_type {question_type} leaves no question to train on")
    if len(records) > train_samples:
        order = np.random.default_rng(seed).permutation(len(records))
        records = [records[k] for k in order[:train_samples]]
    return records


def step_records(records: list[Record], step: int, batch_size: int, seed: int) -> list[Record]:
    """The records of one training step, a function of (seed, step) alone: passes over a fresh
    shuffle each epoch.

    Nothing that happened before, such as a skipped clip, can shift them.
    """
    chosen = []
    for k in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(k, len(records))
        chosen.append(
            records[np.random.default_rng([seed, epoch]).permutation(len(records))[place]]
        )
    return chosen


# ------------------------------------------------------------------------------------------ prompts

# Official templates, double blank included (grpo.py, QUESTION_TEMPLATE).
_TRAIN = (
    "{problem}  Output the thinking process in <think> </think> "
    "and final answer ({answer}) in <answer> </answer> tags."
)
TEMPLATES = {
    "mixed": _TRAIN.replace("{answer}", "letters separated by , if multiple"),
    "single": _TRAIN.replace("{answer}", "select one letter"),
    "multiple": _TRAIN.replace("{answer}", "select letters separated by ,"),
}
VIDEO_TOKEN = "<|video_pad|>"


@dataclass
class Prompter:
    """Turns records into questions for one model and one way of showing clips."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    geometry: video.Geometry
    question_type: str = "mixed"
    fps: float = video.FPS
    max_frames: int = video.MAX_FRAMES
    min_pixels: int = video.MIN_PIXELS
    max_pixels: int = video.MAX_PIXELS

    def render(self, record: Record) -> str:
        """The prompt in the model's chat form: the clip's placeholder, then the question."""
        question = TEMPLATES[self.question_type].replace("{problem}", record.problem)
        content = [{"type": "video"}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        count = text.count(VIDEO_TOKEN)
        if count != 1:
            raise DataError(
                f"record {record.id}: its prompt holds {count} {VIDEO_TOKEN} instead of 1; the "
                "question contains the token, or the model's chat template places no video"
            )
        return text

    def __call__(self, record: Record, clip_of: Record | None = None) -> Question:
        """The question of `record`, about its own clip (or about another's, as a control).

        Raises video.VideoError when the clip cannot be used.
        """
        return self.question(record, video.load_clip(*self.clip_arguments(clip_of or record)))

    def clip_arguments(self, record: Record) -> tuple:
        """What video.load_clip needs to know, for a call here or in another process."""
        pixels = (self.min_pixels, self.max_pixels)
        return (str(record.video), self.fps, self.max_frames, *pixels, self.geometry.factor)

    def question(self, record: Record, clip: video.Clip) -> Question:
        """The question of `record` about frames that are decoded and resized already."""
        patches, grid = video.patchify(clip.frames, self.geometry)
        prompt = self.render(record)
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        video_id = self.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        place, tokens = ids.index(video_id), len(patches) // self.geometry.merge_size**2
        ids_P = torch.tensor(ids[:place] + [video_id] * tokens + ids[place + 1 :])
        seconds_per_patch = clip.seconds * self.geometry.temporal_patch_size
        positions = video.mrope_positions(ids_P, video_id, grid, seconds_per_patch, self.geometry)
        return Question(record, prompt, ids_P, positions, patches, grid, clip.seconds)


def load_chat_template(model_name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The processor's chat template if the checkpoint has one, else the tokenizer's."""
    for name in ("chat_template.jinja", "chat_template.json"):
        file = cached_file(model_name_or_path, name, _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False)  # fmt: skip
        if file:
            text = Path(file).read_text(encoding="utf-8")
            return text if name.endswith(".jinja") else json.loads(text)["chat_template"]
    if not tokenizer.chat_template:
        raise DataError(
            f"{model_name_or_path}: has no chat template; a Qwen-VL instruct checkpoint is needed"
        )
    return tokenizer.chat_template
