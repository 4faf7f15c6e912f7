"""The settings of a run: every flag of twgrpo.py with its validation, and the files they name.

A run without a model trains a built-in toy, whose defaults replace the recipe's.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser

import files
import toy
import video
from data import MAX_PROMPT_LENGTH, select_records
from files import UserError, printable
from model import ranks
from records import Record, load_records
from rewards import REWARDS

# Changing any of these makes it a different run. Batches are compared by their product.
IDENTITY = (
    "seed toy model_name_or_path jsonl_path video_root question_type train_samples num_generations"
).split()
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
COMMAND = ("output_dir", "resume_from_checkpoint", "allow_changes", "dry_run")  # may change


# Valid ranges of numbers; flags not listed here use the range of their type.
INTERVALS = {
    "[0, 1)": "epsilon adam_beta1 adam_beta2",
    "[0, 1]": "max_skip_fraction",
    "[1, 1e9]": "alpha",
    "[0, 1e9]": "epsilon_high beta weight_decay clip_cache_gb",
    "[0.001, 1e9]": "temperature",  # any lower, and all completions are the same
    "(0, 86400]": "clip_timeout",  # a day
    "[2, 2e9]": "num_generations max_frames",  # a group to compare; one temporal patch
    "[0, 2e9]": "seed warmup_steps dataloader_num_workers",
}
BY_TYPE = {int: "[1, 2e9]", float: "(0, 1e9]"}  # the square must fit in float32


def flag(default: object, text: str, **options: object) -> object:
    how = {"metadata": {"help": text, **options}}  # for argparse
    if isinstance(default, list):
        return field(default_factory=default.copy, **how)
    return field(default=default, **how)


def is_in(value: float, interval: str) -> bool:
    """Whether a number is in an interval such as "[0, 1)"; a NaN never is."""
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)


@dataclass
class Data:
    _argument_group_name = "model and data"
    model_name_or_path: str | None = flag(None, "Qwen2.5-VL, Qwen2-VL or Qwen3-VL; none: the toy")
    jsonl_path: str | None = flag(None, "training questions, a JSON list or JSONL")
    video_root: str = flag("", "directory that video paths are relative to")
    eval_jsonl_path: str | None = flag(None, "questions to evaluate on, before and after training")
    eval_on_start: bool = flag(True, "also evaluate before training")
    output_dir: str | None = flag(None, "output directory; none: a new one under runs/")
    toy: Literal["colours", "events"] | None = flag(
        None, "the toy to train when no model is given: colours (the default) or events"
    )
    question_type: Literal["mixed", "single", "multiple"] = flag(
        "mixed", "which questions to use, and their prompt"
    )
    train_samples: int = flag(2000, "use at most this many questions, drawn with --seed")


@dataclass
class Clips:
    _argument_group_name = "clips"
    fps: float = flag(video.DEFAULTS.fps, "frames sampled per second")
    max_frames: int = flag(video.DEFAULTS.max_frames, "maximum number of frames")
    min_pixels: int = flag(video.DEFAULTS.min_pixels, "minimum pixels per frame after resizing")
    max_pixels: int = flag(video.DEFAULTS.max_pixels, "maximum pixels per frame after resizing")
    max_prompt_length: int = flag(
        MAX_PROMPT_LENGTH, "maximum prompt tokens including video; longer ones are skipped"
    )


@dataclass
class Objective:
    _argument_group_name = "objective"
    loss_type: Literal["tw_grpo", "grpo"] = flag(
        "tw_grpo", "tw_grpo: weighted mean over tokens; grpo: mean over sequences of token means"
    )
    alpha: float = flag(1.7, "upper bound of the token weights; 1: all weights are 1")
    token_weights: Literal["divergence", "entropy", "position", "shuffled", "none"] = flag(
        "divergence", "the paper's weights, or a control: docs/equations.md, eqs. 31 to 33"
    )
    normalize_token_weights: bool = flag(False, "divide the weights by their mean over the tokens")
    divergence: Literal["official", "textbook"] = flag(
        "official", "the divergence behind the weights"
    )
    ended_rows: Literal["uniform", "exclude"] = flag(
        "uniform", "how to treat completions that have ended"
    )
    epsilon: float = flag(0.2, "ratios are clipped below 1 - epsilon")
    epsilon_high: float = flag(0.28, "ratios are clipped above 1 + epsilon_high")
    beta: float = flag(0.0, "KL coefficient, to the initial model; 0: no reference model")
    reward_funcs: list[str] = flag(["accuracy", "format"], "rewards, summed", choices=list(REWARDS))
    num_generations: int = flag(8, "G, completions per question")
    max_completion_length: int = flag(1024, "maximum tokens per completion")
    temperature: float = flag(1.0, "for sampling and for the log-probs in the loss")
    num_iterations: int = flag(1, "optimizer steps on the same completions")


@dataclass
class Optimization:
    _argument_group_name = "optimization"
    learning_rate: float = flag(1e-6, "peak value; decays linearly to 0 at max_steps")
    warmup_steps: int = flag(0, "steps of linear warm-up")
    adam_beta1: float = flag(0.9, "AdamW beta1")
    adam_beta2: float = flag(0.999, "AdamW beta2")
    weight_decay: float = flag(0.0, "AdamW weight decay")
    max_grad_norm: float = flag(20.0, "clip the gradient to this norm")
    max_steps: int = flag(1000, "training steps")
    per_device_train_batch_size: int = flag(1, "B, questions scored together on each rank")
    gradient_accumulation_steps: int = flag(1, "micro-batches of B per optimizer step")
    freeze_vision_modules: bool = flag(True, "do not train the vision tower")
    gradient_checkpointing: bool = flag(True, "recompute decoder layers to save memory")
    attn_implementation: Literal["sdpa", "flash_attention_2"] = flag(
        "sdpa", "attention over packed rows: torch's, or the flash-attn package (CUDA)"
    )


@dataclass
class Bookkeeping:
    _argument_group_name = "bookkeeping"
    seed: int = flag(42, "seed for data order, sampling and the toy")
    save_steps: int = flag(100, "steps between checkpoints")
    save_only_model: bool = flag(False, "save weights only; the run cannot be resumed")
    resume_from_checkpoint: str | None = flag(None, "a checkpoint, or auto: the run's newest")
    allow_changes: bool = flag(False, "allow resuming with another seed, data, model or batch")
    dataloader_num_workers: int = flag(4, "processes that prefetch clips; 0: one, no prefetch")
    clip_cache_gb: float = flag(1.0, "decoded clips cached for later epochs, in 1e9 bytes per rank")
    clip_timeout: float = flag(60.0, "seconds after which a clip counts as unreadable")
    max_skip_fraction: float = flag(0.05, "stop if a larger fraction of clips is unreadable")
    dry_run: bool = flag(False, "show prompts, clips, memory and schedule, then exit")


GROUPS = (Data, Clips, Objective, Optimization, Bookkeeping)  # in the order of --help


@dataclass
class Config(*reversed(GROUPS)):
    """Every setting of a run. The defaults are the paper's recipe (official scripts/tw-grpo.sh)."""

    def check(self) -> None:
        """Raises UserError for an invalid setting."""
        named = {name: key for key, names in INTERVALS.items() for name in names.split()}
        for name, value in dataclasses.asdict(self).items():
            interval = named.get(name, BY_TYPE.get(type(value)))
            if interval and not is_in(value, interval):
                raise UserError(f"--{name} {value} must be in {interval}")
        has_model, has_data = self.model_name_or_path is not None, self.jsonl_path is not None
        other_weights = self.token_weights != "divergence" or self.normalize_token_weights
        other_divergence = self.divergence != "official" or self.ended_rows != "uniform"
        no_divergence = self.token_weights not in ("divergence", "shuffled")
        errors = {
            "--token_weights and --normalize_token_weights need --loss_type tw_grpo": (
                other_weights and self.loss_type != "tw_grpo"
            ),
            f"--token_weights {self.token_weights} ignores --divergence and --ended_rows; leave "
            "them out": other_divergence and no_divergence,
            "--min_pixels must be at most --max_pixels": self.min_pixels > self.max_pixels,
            "--model_name_or_path and --jsonl_path go together; neither means the toy": (
                has_model != has_data
            ),
            "--toy is for runs without --model_name_or_path": self.toy and has_model,
            "--eval_jsonl_path and --video_root need --jsonl_path; the toy brings its own": (
                not has_data and (self.eval_jsonl_path or self.video_root)
            ),
            "--resume_from_checkpoint needs the --output_dir of the run to resume": (
                self.resume_from_checkpoint and not self.output_dir
            ),
        }
        for message, is_wrong in errors.items():
            if is_wrong:
                raise UserError(message)


def parse_config(arguments: list[str] | None = None) -> Config:
    """Parses and checks the flags. Without a model, a toy's defaults replace the recipe's; flags
    given explicitly take precedence."""
    parser = HfArgumentParser(GROUPS, description="Train a video-language model with TW-GRPO.")
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}; --help lists the flags")
    if flags.model_name_or_path is None:
        name = flags.toy or "colours"
        parser.set_defaults(toy=name, **toy.TOYS[name].defaults)
        flags = parser.parse_args(arguments)
    cfg = Config(**vars(flags))
    cfg.check()
    return cfg


def make_output_dir(cfg: Config) -> Path:
    """A new directory for this run, or that of the run to resume, locked until this process ends.
    If it is in use or not writable, raises UserError and leaves its contents untouched."""
    name = Path(cfg.model_name_or_path or "toy").name
    if cfg.loss_type != "tw_grpo":
        name += f"-{cfg.loss_type}"
    directory = Path(cfg.output_dir) if cfg.output_dir else Path("runs") / name
    try:
        if cfg.output_dir is None:
            directory = files.new_directory(directory)
        check_contents(cfg, directory)
        directory.mkdir(parents=True, exist_ok=True)
        if files.lock(directory / ".lock") is None:
            raise UserError(f"--output_dir {directory} is in use by another process")
        check_contents(cfg, directory)  # again: a run may have come and gone before the lock
    except OSError as error:
        raise UserError(f"--output_dir {directory} cannot be written: {error.strerror}") from None
    return directory


def check_contents(cfg: Config, directory: Path) -> None:
    """Raises UserError unless the directory is empty or holds a run to resume."""
    begun = {".lock", ".toy.partial"}  # left over from a killed start
    if toy.is_world(directory / "toy", cfg.toy, cfg.seed):
        begun.add("toy")
    names = {path.name for path in directory.iterdir()} - begun if directory.is_dir() else ()
    if names and not (cfg.resume_from_checkpoint and "config.json" in names):
        raise UserError(
            f"--output_dir {directory} is not empty; choose another, or if it holds a run (its "
            "config.json), resume that with --resume_from_checkpoint auto"
        )


def settings_of(cfg: Config) -> dict:
    """The contents of a run's config.json, apart from the history."""
    return dataclasses.asdict(cfg) | {"world_size": ranks.world()}


def same(old: object, new: object) -> bool:
    """Whether two values of a flag are equal or name the same file."""
    if not (isinstance(old, str) and isinstance(new, str)):  # samefile takes 1 for stdout
        return old == new
    try:
        return old == new or os.path.samefile(old, new)
    except (OSError, ValueError):
        return False


def check_changes(cfg: Config, old: dict, done: int) -> dict:
    """Reports each setting that differs from `old`, the settings of a run with `done` steps, and
    returns their old values. Raises UserError if this would be a different run."""
    if cfg.max_steps < done:
        raise UserError(
            f"--max_steps {cfg.max_steps} is below the {done} steps that this run has done; give "
            f"at least {done}"
        )
    new = settings_of(cfg)
    kept = (name for name in new if name in old and name not in COMMAND)
    changed = {name: old[name] for name in kept if not same(old[name], new[name])}
    lines = {name: f"{name} was {value}, is now {new[name]}" for name, value in changed.items()}
    before, now = (math.prod(s[name] for name in (*BATCH, "world_size")) for s in (old, new))
    another = [n for n in lines if n in IDENTITY or (n in BATCH and before != now)]
    if another and not cfg.allow_changes:
        raise UserError(
            f"{'; '.join(lines[name] for name in another)}: this would be a new run; give the "
            "old values, or --allow_changes true"
        )
    if "max_steps" in lines:
        lines["max_steps"] += ": the learning rate now falls to 0 there"
    for line in lines.values():
        print(printable(f"changed after step {done}: {line}"))
    return changed


def check_attention(cfg: Config, device: torch.device) -> None:
    """Raises UserError, or flash_attn's ImportError, if this attention cannot be used here."""
    if (name := cfg.attn_implementation) == "flash_attention_2":
        if device.type != "cuda":
            raise UserError(f"--attn_implementation {name} needs CUDA; sdpa works everywhere")
        import flash_attn  # noqa: F401


def training_records(cfg: Config) -> list[Record]:
    records = load_records(cfg.jsonl_path, cfg.video_root)
    return select_records(records, cfg.question_type, cfg.train_samples, cfg.seed)


def held_out_records(cfg: Config) -> list[Record]:
    return load_records(cfg.eval_jsonl_path, cfg.video_root) if cfg.eval_jsonl_path else []


def show_toy_flags(cfg: Config) -> None:
    print(f"No --model_name_or_path: training the toy {cfg.toy!r}, which sets these flags:")
    defaults = toy.TOYS[cfg.toy].defaults
    print("  " + " ".join(f"--{name} {value}" for name, value in defaults.items()))


def make_toy(cfg: Config, root: Path) -> None:
    """Creates the toy world unless it exists. Raises OSError if something else is in its place."""
    show_toy_flags(cfg)
    if not (cfg.allow_changes and (root / "model").is_dir()):  # it may be that of another seed
        toy.prepare(root, cfg.seed, cfg.toy)
