"""Turns records into questions that a model can read.

    select_records   the questions to train on
    step_records     the questions of one training step, determined by (seed, step) alone
    Prompter         Record -> Question: prompt, token ids, position ids, patches of its clip
    check_prompts    lists every question that cannot become a prompt, before a run starts

File formats are in records.py. `python -m tools.check` lists every fault in a file;
`python -m tools.convert` makes training files from CLEVRER, NExT-GQA and STAR.
Shape letters: P prompt tokens, S patches of a clip, F frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

import video
from files import UserError, read_json
from records import Record, refuse
from rewards import tagged_answer


@dataclass
class Question:
    """One record as the model reads it."""

    record: Record
    prompt: str  # rendered, with the video as one placeholder
    ids_P: Tensor  # (P,) int64, with the placeholder expanded to one id per video token
    positions_3P: Tensor  # (3, P) int64, see video.mrope_positions
    patches: Tensor  # (S, 1176) float32
    grid: tuple[int, int, int]  # (t, h, w) in patches
    seconds: float  # between two frames


# ---------------------------------------------------------------------------------------- selection


def select_records(
    records: list[Record], question_type: str, train_samples: int, seed: int
) -> list[Record]:
    """The questions to train on: filtered by number of right answers, at most `train_samples`.

    "single" keeps questions with one right answer, "multiple" those with several, "mixed" all. Like
    the official loader, it looks for a comma in the solution. Raises UserError if none are left.
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
    """The records of one training step, a function of (seed, step) alone: each epoch is reshuffled,
    and nothing that happened earlier, such as a skipped clip, changes the order."""
    chosen = []
    for k in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(k, len(records))
        order = np.random.default_rng([seed, epoch, 0, 5]).permutation(len(records))
        chosen.append(records[order[place]])
    return chosen


# ------------------------------------------------------------------------------------------ prompts

# The exact text of the prompt after the question, whitespace included. docs/prompts.md says which
# row of the paper each belongs to.
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
STYLES = {  # evaluation; "think" is the training prompt, one of the above
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
SYSTEM_PROMPT = (  # only used by the two CLEVRER evaluators
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
    """The user's text after the clip: the question, its options and the instruction.

    With "think", a question that asks for a number gets the DVD-counting training template.
    """
    if style == "think":
        is_number = record.kind in ("numerical", "regression")
        template = NUMBER_TEMPLATE if is_number else TEMPLATES[question_type]
    else:
        template = STYLES[style]
    problem = record.text
    if style in WITH_KIND_SUFFIX:
        problem += "" if record.options else "\n"  # as in the general evaluators
        template += KIND_SUFFIX[record.kind or "multiple choice"]
    return template.replace("{problem}", problem)


@dataclass
class Prompter:
    """Turns records into questions for a given model and clip settings."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    geometry: video.Geometry
    question_type: str = "mixed"
    clips: video.ClipSettings = video.DEFAULTS
    style: str = "think"  # one of STYLES
    seconds_per_patch: float | None = None  # told to the model; None: the true spacing
    repeat_frames: int = 0  # show exactly this many, repeating sampled ones; 0: as sampled
    load_clip: Callable[..., video.Clip] = video.load_clip  # untrusted files: ClipReader.load_clip
    max_prompt_length: int = MAX_PROMPT_LENGTH  # tokens; longer prompts are refused, not truncated

    def render(self, text: str) -> str:
        """The prompt in the model's chat format: the clip's placeholder, then the question text.
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

    def tokenize(self, record: Record, times: Sequence[float] = ()) -> tuple[str, list[int]]:
        """The prompt and its ids, with the clip as one placeholder, or with one for each of `times`
        (seconds). Raises UserError if the question contains a special token, the template does not
        render exactly one video, or the prompt is too long."""
        text = question_text(record, self.style, self.question_type)
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special and token.content in text:
                raise UserError(f"its text contains the model's special token {token.content}")
        prompt = self.render(text)
        if prompt.count(VIDEO_TOKEN) != 1:
            raise UserError(f"the chat template shows {prompt.count(VIDEO_TOKEN)} videos, not one")
        timed = with_times(prompt, times) if times else prompt
        ids = self.tokenizer(timed, add_special_tokens=False)["input_ids"]
        self._check_length(len(ids))
        return prompt, ids

    def _check_length(self, tokens: int) -> None:
        if tokens > self.max_prompt_length:
            limit = f"--max_prompt_length and the model allow {self.max_prompt_length:,}"
            raise UserError(f"its prompt has {tokens:,} tokens; {limit}")

    def __call__(self, record: Record, clip_of: Record | None = None) -> Question:
        """The question of `record` about its own clip (or, as a control, that of `clip_of`).

        Raises video.VideoError if the clip cannot be used or gives too many tokens.
        """
        path = str((clip_of or record).video)
        clip = self.load_clip(path, self.clips, self.geometry.factor)
        if self.repeat_frames:
            clip = video.repeat_frames(clip, self.repeat_frames)
        patches, grid = video.patchify(clip.frames, self.geometry)
        times = patch_times(clip, self.geometry) if self.geometry.timestamps else ()
        video_id = self.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        tokens = len(patches) // self.geometry.merge_size**2
        try:
            prompt, ids = self.tokenize(record, times)
            ids_P, per_placeholder = torch.tensor(ids), tokens // ids.count(video_id)
            ids_P = ids_P.repeat_interleave(torch.where(ids_P == video_id, per_placeholder, 1))
            self._check_length(len(ids_P))
        except UserError as error:  # it passed `check_prompts`, so the clip gives too many tokens
            raise video.VideoError(f"{record.video}: {error}") from None
        told = self.seconds_per_patch
        told = clip.seconds * self.geometry.temporal_patch_size if told is None else told
        positions = video.mrope_positions(ids_P, video_id, grid, told, self.geometry)
        return Question(record, prompt, ids_P, positions, patches, grid, clip.seconds)


def patch_times(clip: video.Clip, geometry: video.Geometry) -> list[float]:
    """The time of each temporal patch of a clip, in seconds: the mean of its first and last frame
    (transformers 4.57 to 5.17, Qwen3VLProcessor._calculate_timestamps)."""
    q = geometry.temporal_patch_size
    times = clip.times or [k * clip.seconds for k in range(len(clip.frames))]
    return [(a + b) / 2 for a, b in zip(times[::q], times[q - 1 :: q], strict=True)]


def with_times(prompt: str, times: Sequence[float]) -> str:
    """A prompt for Qwen3-VL: one video block per temporal patch, each preceded by its time as text.
    Raises UserError if the video is not between its two vision tokens.

    OFFICIAL: transformers 4.57, with which Qwen3-VL was published, replaces the whole of
    `<|vision_start|><|video_pad|><|vision_end|>`; since 5.0 the outer pair stays around all blocks.
    OURS: as published.
    """
    block = f"<|vision_start|>{VIDEO_TOKEN}<|vision_end|>"
    if block not in prompt:
        raise UserError("the chat template does not put the video between its two vision tokens")
    return prompt.replace(block, "".join(f"<{seconds:.1f} seconds>{block}" for seconds in times))


def check_prompts(prompter: Prompter, records: list[Record], path: str) -> None:
    """Renders and tokenizes every question of the file `path`, without its clip. Raises UserError
    listing all that cannot become a prompt."""
    errors, times = [], (0.0,) if prompter.geometry.timestamps else ()
    for record in records:
        try:
            prompter.tokenize(record, times)
        except UserError as error:
            errors.append(f"record {record.id}: {error}")
    refuse(path, "question(s) that cannot become a prompt", errors)


def checkpoint_file(model_name_or_path: str, name: str) -> str | None:
    """The path of one file of a checkpoint (directory or hub name); None if it does not exist."""
    return cached_file(
        model_name_or_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def load_chat_template(model_name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The processor's chat template (chat_template.json) if the checkpoint has one, else the
    tokenizer's. Raises UserError if there is neither."""
    template = tokenizer.chat_template
    if file := checkpoint_file(model_name_or_path, "chat_template.json"):
        template = read_json(Path(file), "it must contain a chat template").get("chat_template")
    if not template or not isinstance(template, str):
        raise UserError(
            f"{model_name_or_path}: has no chat template; a Qwen-VL instruct checkpoint is needed"
        )
    return template
