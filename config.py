"""The settings of a run: every flag of twgrpo.py, what it must not be, and the files it names.

A run without a model is the embedded toy: toy.DEFAULTS take the place of the recipe's defaults, and
`prepare_toy` makes the files that the other flags would have named.
"""

import dataclasses
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser

import ranks
import toy
import video
from data import MAX_PROMPT_LENGTH, Record, load_records, select_records
from rewards import REWARDS


class ConfigError(Exception):
    """Flags that make no sense. The message names the flag and what it should be."""


def flag(default, text: str):
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every setting of a run. The defaults are the paper's recipe (official scripts/tw-grpo.sh)."""

    # What to train, on what
    model_name_or_path: str | None = flag(None, "Qwen2.5-VL or Qwen2-VL checkpoint; none: the toy")
    jsonl_path: str | None = flag(None, "training questions, a JSON list or JSONL")
    video_root: str = flag("", "directory the records' video paths start from")
    eval_jsonl_path: str | None = flag(None, "questions to evaluate on before and after training")
    output_dir: str | None = flag(None, "where the run is written; none: a new one under runs/")
    question_type: Literal["mixed", "single", "multiple"] = flag("mixed", "questions, and prompt")
    train_samples: int = flag(2000, "at most this many questions, chosen by the seed")
    # How a clip is shown to the model
    fps: float = flag(video.FPS, "frames sampled per second")
    max_frames: int = flag(video.MAX_FRAMES, "frames, at most")
    min_pixels: int = flag(video.MIN_PIXELS, "pixels per frame after resizing, at least")
    max_pixels: int = flag(video.MAX_PIXELS, "pixels per frame after resizing, at most")
    max_prompt_length: int = flag(
        MAX_PROMPT_LENGTH, "tokens of a prompt with its video; longer ones are skipped"
    )
    # The objective
    loss_type: Literal["tw_grpo", "grpo"] = flag(
        "tw_grpo", "tw_grpo: weighted mean over tokens; grpo: mean over sequences of their means"
    )
    alpha: float = flag(1.7, "upper bound of the token weights; 1: all weights are 1")
    divergence: Literal["official", "textbook"] = flag("official", "what the weights measure")
    ended_rows: Literal["uniform", "exclude"] = flag("uniform", "completions past their end")
    epsilon: float = flag(0.2, "ratios are clipped below 1 - epsilon")
    epsilon_high: float = flag(0.28, "ratios are clipped above 1 + epsilon_high")
    beta: float = flag(0.0, "weight of the KL to the initial model; 0: no reference model")
    reward_funcs: list[str] = flag(["accuracy", "format"], f"summed, of: {', '.join(REWARDS)}")
    num_generations: int = flag(8, "G, completions per question")
    max_completion_length: int = flag(1024, "tokens per completion, at most")
    temperature: float = flag(1.0, "of sampling, and of the log-probs in the loss")
    num_iterations: int = flag(1, "optimizer steps on the same completions")
    # Optimization
    learning_rate: float = flag(1e-6, "peak; decays linearly to 0 at max_steps")
    warmup_steps: int = flag(0, "steps of linear warm-up")
    adam_beta1: float = flag(0.9, "of AdamW")
    adam_beta2: float = flag(0.999, "of AdamW")
    weight_decay: float = flag(0.0, "of AdamW")
    max_grad_norm: float = flag(20.0, "the gradient is scaled down to this norm")
    max_steps: int = flag(1000, "training steps")
    per_device_train_batch_size: int = flag(1, "B, questions scored at once on each rank")
    gradient_accumulation_steps: int = flag(1, "B x this many questions a rank and step")
    freeze_vision_modules: bool = flag(True, "leave the vision tower as it is")
    gradient_checkpointing: bool = flag(True, "trade time for memory in the decoder layers")
    attn_implementation: Literal["sdpa", "flex_attention", "flash_attention_2"] = flag(
        "sdpa", "attention over packed rows; the other two need CUDA (packing.py)"
    )
    # Bookkeeping
    seed: int = flag(42, "of data order, sampling and the toy")
    save_steps: int = flag(100, "steps between checkpoints")
    logging_steps: int = flag(1, "steps between lines of metrics.jsonl")
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", "metrics also go there")
    save_only_model: bool = flag(False, "checkpoints without what resuming needs")
    resume_from_checkpoint: str | None = flag(None, "a checkpoint, or auto: the run's newest")
    dataloader_num_workers: int = flag(4, "processes that decode clips ahead; 0: one, not ahead")
    clip_timeout: float = flag(60.0, "seconds after which a clip counts as unreadable")
    max_skip_fraction: float = flag(0.05, "more unreadable clips than this end the run")
    dry_run: bool = flag(False, "show prompt, clips, memory and schedule; train nothing")

    def check(self) -> None:
        """Raises ConfigError on a setting that makes no sense."""
        rules = {
            "--alpha is the upper bound of the token weights: at least 1": self.alpha >= 1,
            "--num_generations must be at least 2, to compare": self.num_generations >= 2,
            "--epsilon must be in [0, 1)": 0 <= self.epsilon < 1,
            "--epsilon_high must be 0 or more": self.epsilon_high >= 0,
            "--beta must be 0 or more": self.beta >= 0,
            "--temperature must be above 0, or all completions are the same": self.temperature > 0,
            "--learning_rate must be above 0": self.learning_rate > 0,
            "--max_grad_norm must be above 0": self.max_grad_norm > 0,
            "--warmup_steps must be 0 or more": self.warmup_steps >= 0,
            "--weight_decay must be 0 or more": self.weight_decay >= 0,
            "--adam_beta1 and --adam_beta2 must be in [0, 1)": (
                0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1
            ),
            "--seed must be 0 or more": self.seed >= 0,
            "--dataloader_num_workers must be 0 or more": self.dataloader_num_workers >= 0,
            "--clip_timeout must be above 0": self.clip_timeout > 0,
            "--max_skip_fraction must be in [0, 1]": 0 <= self.max_skip_fraction <= 1,
            "--fps must be above 0": self.fps > 0,
            "--max_frames must be at least 2, one temporal patch": self.max_frames >= 2,
            "--min_pixels must be in 1..max_pixels": 0 < self.min_pixels <= self.max_pixels,
            "--reward_funcs needs at least one reward": len(self.reward_funcs) > 0,
            "--reward_funcs names a reward twice": (
                len(set(self.reward_funcs)) == len(self.reward_funcs)
            ),
            "--model_name_or_path and --jsonl_path go together; neither means the toy": (
                (self.model_name_or_path is None) == (self.jsonl_path is None)
            ),
            "--eval_jsonl_path and --video_root need --jsonl_path; the toy brings its own": (
                self.jsonl_path is not None or not (self.eval_jsonl_path or self.video_root)
            ),
        }
        for name in ("max_completion_length", "num_iterations", "max_steps", "save_steps",
                     "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps",
                     "train_samples", "max_prompt_length"):  # fmt: skip
            rules[f"--{name} must be at least 1"] = getattr(self, name) >= 1
        for name in ("alpha", "beta", "temperature", "learning_rate", "epsilon_high", "fps"):
            rules[f"--{name} must be finite"] = math.isfinite(getattr(self, name))
        for name in self.reward_funcs:
            rules[f"--reward_funcs knows {', '.join(REWARDS)}, not {name!r}"] = name in REWARDS
        for message, holds in rules.items():
            if not holds:
                raise ConfigError(message)


def parse_config(arguments: list[str] | None = None) -> Config:
    """Flags to a checked Config. Without a model, toy.DEFAULTS replace the recipe's; flags win."""
    parser = HfArgumentParser(Config, description="Train a video-language model with TW-GRPO.")
    cfg, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}; --help lists the flags")
    if cfg.model_name_or_path is None:
        parser.set_defaults(**toy.DEFAULTS)
        (cfg,) = parser.parse_args_into_dataclasses(arguments)
    cfg.check()
    return cfg


def make_output_dir(cfg: Config) -> Path:
    """A directory for this run and no other, or that of the run to go on with. Raises ConfigError
    if it cannot be had."""
    if cfg.output_dir is not None:
        directory = Path(cfg.output_dir)
        if not cfg.resume_from_checkpoint and directory.is_dir() and any(directory.iterdir()):
            raise ConfigError(
                f"--output_dir {directory} is not empty; choose another, or go on with the run in "
                "it by --resume_from_checkpoint auto"
            )
    elif cfg.resume_from_checkpoint:
        raise ConfigError(
            "--resume_from_checkpoint needs the --output_dir of the run to go on with"
        )
    else:
        name = Path(cfg.model_name_or_path or "toy").name
        if cfg.loss_type != "tw_grpo":
            name += f"-{cfg.loss_type}"
        directory, k = Path("runs") / name, 1
        while directory.exists():
            k += 1
            directory = Path("runs") / f"{name}-{k}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".write").touch()
        (directory / ".write").unlink()
    except OSError as error:
        raise ConfigError(f"--output_dir {directory} cannot be written: {error.strerror}") from None
    return directory


def check_attention(cfg: Config, device: torch.device) -> None:
    """Raises ConfigError if the attention of packing.py that was asked for cannot train here."""
    name = cfg.attn_implementation
    if name == "sdpa" or cfg.dry_run:
        return
    if device.type != "cuda":
        raise ConfigError(f"--attn_implementation {name} needs CUDA; sdpa works everywhere")
    if name == "flash_attention_2":
        try:
            import flash_attn  # noqa: F401
        except ImportError as error:  # not there, or built for another torch
            raise ConfigError(
                f"--attn_implementation {name} needs: pip install flash-attn ({error})"
            ) from None


def training_records(cfg: Config) -> list[Record]:
    records = load_records(cfg.jsonl_path, cfg.video_root)
    return select_records(records, cfg.question_type, cfg.train_samples, cfg.seed)


def held_out_records(cfg: Config) -> list[Record]:
    return load_records(cfg.eval_jsonl_path, cfg.video_root) if cfg.eval_jsonl_path else []


def prepare_toy(cfg: Config, root: Path) -> Config:
    """The same settings, pointed at a toy world under `root`, which the first rank makes."""
    if ranks.is_main():
        print("No --model_name_or_path: training the embedded toy, which sets these flags:")
        print("  " + " ".join(f"--{name} {value}" for name, value in toy.DEFAULTS.items()))
        if not (root / "model").exists():
            print("Making its clips and its model first takes about a minute.", flush=True)
            shutil.rmtree(root, ignore_errors=True)  # of a run that was killed while making it
            toy.prepare(root, cfg.seed)
    ranks.barrier()
    return dataclasses.replace(
        cfg,
        model_name_or_path=str(root / "model"),
        jsonl_path=str(root / "train.jsonl"),
        eval_jsonl_path=str(root / "test.jsonl"),
        video_root=str(root),
    )
