"""Questions about videos as a model reads them; and the command line that checks and makes files.

    select_records   which questions to train on
    step_records     which of them a training step uses, fixed by (seed, step) alone
    Prompter         Record -> Question: prompt, token ids, position ids, patches of its clip
    check_prompts    names every question that cannot become a prompt, before a run starts

    python data.py check FILE --video_root DIR [--decode]     every fault of a file, by name
    python data.py clevrer RAW.json OUT.json                  CLEVRER's own questions -> records
    python data.py qai IN OUT --seed S [--p 0.5]              question-answer inversion

The formats of the files are in records.py, the two conversions in convert.py.
Letters in shapes: P prompt tokens, S patches of a clip, F frames.
"""

import argparse
import collections
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

import convert
import video
from files import UserError
from loader import ClipReader
from records import Record, load_records, printable, read_records, refuse  # noqa: F401
from rewards import answer_set, tagged_answer


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


# ---------------------------------------------------------------------------------------- selection


def select_records(
    records: list[Record], question_type: str, train_samples: int, seed: int
) -> list[Record]:
    """The questions to train on: by number of right answers, then at most `train_samples` of them.

    "single" keeps questions with one right answer, "multiple" those with several, "mixed" all; the
    official loader, too, goes by the comma in the solution. Raises UserError if none is left.
    """
    if question_type != "mixed":
        several = question_type == "multiple"
        records = [r for r in records if ("," in tagged_answer(r.solution)) == several]
    if not records:
        raise UserError(f"--question_type {question_type} leaves no question to train on")
    if len(records) > train_samples:
        order = np.random.default_rng([seed, 0, 0, 4]).permutation(len(records))
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
            records[np.random.default_rng([seed, epoch, 0, 5]).permutation(len(records))[place]]
        )
    return chosen


# ------------------------------------------------------------------------------------------ prompts

# What the prompt says after the question. Each is kept to the letter, blanks included; which row of
# the paper each belongs to stands in docs/prompts.md.
_THINK = (
    "{problem}  Output the thinking process in <think> </think> "
    "and final answer ({answer}) in <answer> </answer> tags."
)
TEMPLATES = {  # training, by --question_type (grpo.py, QUESTION_TEMPLATE)
    "mixed": _THINK.replace("{answer}", "letters separated by , if multiple"),
    "single": _THINK.replace("{answer}", "select one letter"),
    "multiple": _THINK.replace("{answer}", "select letters separated by ,"),
}
NUMBER_TEMPLATE = _THINK.replace("{answer}", "number")  # training on DVD-counting (Video-R1)
STYLES = {  # evaluation; "think" is what the model was trained with, one of the above
    "think": None,
    "r1_system": (  # eval_clevrer.py
        "{problem} Output the thinking process in <think> </think> and final answer "
        "(letters separated by , if multiple) in <answer> </answer> tags. "
    ),
    "direct": (  # eval_clevrer_zeroshot.py
        "{problem} Output the final answer (letters separated by , if multiple) "
        "in <answer> </answer> tags directly. "
    ),
    "video_r1": (  # eval_general_videor1.py
        "{problem} Please think about this question as if you were a human pondering deeply. "
        "Engage in an internal dialogue using expressions such as 'let me think', 'wait', 'Hmm', "
        "'oh, I see', 'let's break it down', etc, or other natural language thought expressions. "
        "It's encouraged to include self-reflection or verification in the reasoning process. "
        "Provide your detailed reasoning between the <think> and </think> tags, and then give "
        "your final answer between the <answer> and </answer> tags."
    ),
    "direct_letter": (  # eval_general_zeroshot.py
        "{problem} Answer with the option's letter from the given choices directly."
    ),
    "count": (  # Video-R1's evaluation of DVD-counting
        "{problem} First output the thinking process in <think> </think> "
        "and final answer (number) in <answer> </answer> tags."
    ),
}
SYSTEM_PROMPT = (  # of the two CLEVRER evaluators, and of no other
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
    "</think><answer> answer here </answer>"
)
WITH_SYSTEM_PROMPT = ("r1_system", "direct")
_A_NUMBER = (
    " Please provide the numerical value (e.g., 42 or 3.14) within the <answer> </answer> tags."
)
KIND_SUFFIX = {  # of the two general evaluators, by problem_type
    "multiple choice": " Please provide only the single option letter (e.g., A, B, C, D, etc.) "
    "within the <answer> </answer> tags.",
    "numerical": _A_NUMBER,
    "regression": _A_NUMBER,
    "OCR": " Please transcribe text from the image/video clearly and provide your text answer "
    "within the <answer> </answer> tags.",
    "free-form": " Please provide your text answer within the <answer> </answer> tags.",
}
WITH_KIND_SUFFIX = ("video_r1", "direct_letter")
VIDEO_TOKEN = "<|video_pad|>"
MAX_PROMPT_LENGTH = 4096  # tokens, text and video (official tw-grpo.sh)


def question_text(record: Record, style: str = "think", question_type: str = "mixed") -> str:
    """What the user says after the clip: the question, its options, and what to do.

    With "think", a question that asks for a number gets the template of DVD-counting's training.
    """
    if style == "think":
        template = NUMBER_TEMPLATE if record.is_number else TEMPLATES[question_type]
    else:
        template = STYLES[style]
    problem = record.text
    if style in WITH_KIND_SUFFIX:
        problem += "" if record.options else "\n"  # as the general evaluators have it
        template += KIND_SUFFIX[record.kind or "multiple choice"]
    return template.replace("{problem}", problem)


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
    style: str = "think"  # one of STYLES
    seconds_per_patch: float | None = None  # what the model is told; None: the truth
    repeat_frames: int = 0  # show exactly so many, sampled ones repeated; 0: those sampled
    load_clip: Callable[..., video.Clip] = video.load_clip  # files of others need a ClipReader's
    max_prompt_length: int = MAX_PROMPT_LENGTH  # tokens; a longer prompt is refused, never cut

    def __post_init__(self):
        added = self.tokenizer.added_tokens_decoder.values()
        special = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)))

    def render(self, text: str) -> str:
        """The prompt in the model's chat form: the clip's placeholder, then the question's text.
        Raises UserError if the model's chat template fails."""
        content = [{"type": "video"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        if self.style in WITH_SYSTEM_PROMPT:
            messages.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
        how = dict(chat_template=self.chat_template, tokenize=False, add_generation_prompt=True)
        try:
            return self.tokenizer.apply_chat_template(messages, **how)
        except Exception as error:  # a template is a program and may raise anything
            raise UserError(f"the model's chat template fails on it ({error})") from error

    def tokenize(self, record: Record) -> tuple[str, list[int]]:
        """The prompt and its ids, the clip as one placeholder. Raises UserError if there is none.

        Special tokens come from the template alone. One that stands in the question is text: it is
        spelled out by the ids of its letters.
        """
        text = question_text(record, self.style, self.question_type)
        blotted = self.special.sub(lambda found: "." * len(found[0]), text)
        prompt = self.render(text)
        # What is special in this one is the template's, and it is at the same places.
        template = prompt if blotted == text else self.render(blotted)
        specials = list(self.special.finditer(template))
        edges = [0, *(edge for m in specials for edge in m.span()), len(prompt)]
        pieces = [prompt[start:end] for start, end in itertools.pairwise(edges)]
        videos = pieces[1::2].count(VIDEO_TOKEN)
        if videos != 1 or len(template) != len(prompt):
            raise UserError(f"the chat template shows {videos} videos, or edits the question")
        encoded = self.tokenizer(pieces[::2], add_special_tokens=False, split_special_tokens=True)
        special_ids = self.tokenizer.convert_tokens_to_ids(pieces[1::2])
        ids = encoded["input_ids"][0]
        for special_id, text_ids in zip(special_ids, encoded["input_ids"][1:], strict=True):
            ids = [*ids, special_id, *text_ids]
        if len(ids) > self.max_prompt_length:
            raise UserError(self._too_long(len(ids)))
        return prompt, ids

    def _too_long(self, tokens: int) -> str:
        limit = f"--max_prompt_length and the model allow {self.max_prompt_length:,}"
        return f"its prompt has {tokens:,} tokens; {limit}"

    def __call__(self, record: Record, clip_of: Record | None = None) -> Question:
        """The question of `record`, about its own clip (or about another's, as a control).

        Raises video.VideoError when the clip cannot be used, or gives too many tokens.
        """
        return self.question(record, self.load_clip(*self.clip_arguments(clip_of or record)))

    def clip_arguments(self, record: Record) -> tuple:
        """What load_clip needs to know, for a call here or in another process."""
        pixels = (self.min_pixels, self.max_pixels)
        return (str(record.video), self.fps, self.max_frames, *pixels, self.geometry.factor)

    def question(self, record: Record, clip: video.Clip) -> Question:
        """The question of `record` about frames that are decoded and resized already."""
        if self.repeat_frames:
            clip = video.repeat_frames(clip, self.repeat_frames)
        patches, grid = video.patchify(clip.frames, self.geometry)
        prompt, ids = self.tokenize(record)
        video_id = self.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        place, tokens = ids.index(video_id), len(patches) // self.geometry.merge_size**2
        if (length := len(ids) - 1 + tokens) > self.max_prompt_length:
            raise video.VideoError(f"{record.video}: {self._too_long(length)}")
        ids_P = torch.tensor(ids[:place] + [video_id] * tokens + ids[place + 1 :])
        seconds_per_patch = self.seconds_per_patch
        if seconds_per_patch is None:
            seconds_per_patch = clip.seconds * self.geometry.temporal_patch_size
        positions = video.mrope_positions(ids_P, video_id, grid, seconds_per_patch, self.geometry)
        return Question(record, prompt, ids_P, positions, patches, grid, clip.seconds)


def check_prompts(prompter: Prompter, records: list[Record], path: str) -> None:
    """Renders and tokenizes every question of the file `path`, without its clip. Raises UserError
    naming all that cannot become a prompt."""
    errors = []
    for record in records:
        try:
            prompter.tokenize(record)
        except UserError as error:
            errors.append(f"record {record.id}: {error}")
    refuse(path, "question(s) that cannot become a prompt", errors)


def load_chat_template(model_name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The processor's chat template if the checkpoint has one, else the tokenizer's. Raises
    UserError if there is none."""
    template = tokenizer.chat_template
    for name in ("chat_template.jinja", "chat_template.json"):
        file = cached_file(model_name_or_path, name, _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False)  # fmt: skip
        if file:
            try:
                template = Path(file).read_text(encoding="utf-8")
                if name.endswith(".json"):
                    template = json.loads(template)["chat_template"]
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise UserError(f"{file}: is not a chat template ({error})") from None
            break
    if not template or not isinstance(template, str):
        raise UserError(
            f"{model_name_or_path}: has no chat template; a Qwen-VL instruct checkpoint is needed"
        )
    return template


# ------------------------------------------------------------------------------------- command line


def question_type_of(record: Record) -> str:
    """ "single" or "multiple" for a choice question, else its kind."""
    if record.kind != "multiple choice":
        return record.kind
    return "multiple" if len(answer_set(record.solution)) > 1 else "single"


def check(path: str, video_root: str, decode: bool, timeout: float) -> bool:
    """Prints what a file holds and every fault of it, rows and clips; True if there is none."""
    records, errors = read_records(path, video_root)
    print(f"{path}: {len(records)} records, {len(errors)} bad row(s)")
    for title, values in {
        "source": [r.source for r in records],
        "question type": [question_type_of(r) for r in records],
        "right answers": [len(answer_set(r.solution)) for r in records if is_choice(r)],
    }.items():
        counts = sorted(collections.Counter(values).items(), key=lambda item: str(item[0]))
        counted = ", ".join(f"{name} {count}" for name, count in counts)
        print(printable(f"  by {title}: {counted}"))
    clip_errors = check_clips(records, decode, timeout)
    clips = len({r.video for r in records})
    state = "decoded" if decode else "looked for, not decoded (--decode does)"
    print(f"  clips: {clips}, {state}; {len(clip_errors)} with a fault")
    for error in errors + clip_errors:
        print(printable(f"  {error}"))
    if not records and not errors:
        print(f"  {path}: holds no records")
    return bool(records) and not errors and not clip_errors


def is_choice(record: Record) -> bool:
    return record.kind == "multiple choice"


def check_clips(records: list[Record], decode: bool, timeout: float) -> list[str]:
    """A sentence for every clip that is missing, unreadable or too short, and for every file that
    the records know under several names (a sign of two clips that collided, or of two roots)."""
    names, errors = collections.defaultdict(set), []
    for record in records:
        names[os.path.realpath(record.video)].add(_given_name(record))
    for path, given in names.items():
        if len(given) > 1:
            errors.append(f"{path}: known under {len(given)} names: {', '.join(sorted(given))}")
    with ClipReader(timeout) as reader:
        paths = list(dict.fromkeys(str(r.video) for r in records))
        for path in tqdm(paths, desc="clips", leave=False, disable=None):
            try:
                if decode:
                    reader.load_clip(path)
                else:
                    video.check_file(path)
            except video.VideoError as error:
                errors.append(str(error))
    return errors


def _given_name(record: Record) -> str:
    keys = ("video", "path", "video_filename")
    return next((record.row[k] for k in keys if isinstance(record.row.get(k), str)), "")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="every fault of a file of questions, by name")
    one.add_argument("file")
    one.add_argument("--video_root", default="", help="directory the video paths start from")
    one.add_argument("--decode", action="store_true", help="also read every clip")
    one.add_argument("--timeout", type=float, default=60, help="seconds for a clip, at most")
    one = commands.add_parser("clevrer", help="CLEVRER's own questions -> records")
    one.add_argument("raw")
    one.add_argument("out")
    one = commands.add_parser("qai", help="question-answer inversion of NExT-GQA or STAR rows")
    one.add_argument("file")
    one.add_argument("out")
    one.add_argument("--seed", type=int, default=42, help="the same seed gives the same bytes")
    one.add_argument("--p", type=float, default=0.5, help="share of the questions to invert")
    return top


def main() -> None:
    args = parser().parse_args()
    try:
        if args.command == "check":
            if not 0 < args.timeout <= 86_400:
                raise UserError("--timeout must be above 0 and at most 86,400 seconds")
            sys.exit(0 if check(args.file, args.video_root, args.decode, args.timeout) else 1)
        if args.command == "clevrer":
            counts = convert.clevrer_file(args.raw, args.out)
        else:
            if not 0 <= args.p <= 1 or args.seed < 0:
                raise UserError("--p is a share of the questions, 0 to 1; --seed is 0 or more")
            counts = convert.qai_file(args.file, args.out, args.seed, args.p)
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {printable(str(error))}") from None
    print(f"{args.out}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
