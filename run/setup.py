"""Sets up a run before its first step: directory, policy, prompts, optimizer, schedule."""

import dataclasses
import math
from pathlib import Path

import torch

from data import Prompter
from model import ranks
from model.policy import Policy
from run import checkpoint
from run.config import Config, make_output_dir, make_toy
from run.log import phase
from video import ClipSettings


def prepare(cfg: Config) -> tuple[Config, Path, tuple[Path, dict] | None]:
    """The output directory, and what `checkpoint.to_resume` finds there. Without a model, creates
    the toy world there and points cfg to it. For the first rank. Raises UserError or OSError."""
    directory = make_output_dir(cfg)
    root = directory / "toy"
    if is_toy := cfg.model_name_or_path is None:
        cfg = dataclasses.replace(
            cfg,
            model_name_or_path=str(root / "model"),
            jsonl_path=str(root / "train.jsonl"),
            eval_jsonl_path=str(root / "test.jsonl"),
            video_root=str(root),
        )
    resume = checkpoint.to_resume(cfg, directory)
    if is_toy:
        make_toy(cfg, root)
    return cfg, directory, resume


def load_policy(cfg: Config, freeze_all: bool = False) -> Policy:
    """The model of --model_name_or_path on this rank's device, or this rank's shard of it."""
    device, several = ranks.start(), ranks.world() > 1
    place = "cpu" if several else device
    policy = Policy.load(cfg.model_name_or_path, place, cfg.freeze_vision_modules)
    policy.attn_implementation = cfg.attn_implementation
    if freeze_all:
        policy.model.requires_grad_(False)
    elif cfg.gradient_checkpointing:
        policy.checkpoint_activations()
    if several:
        policy.shard(device)
    return policy


def make_prompter(cfg: Config, policy: Policy, **options) -> Prompter:
    """Builds the prompter for this model, with the clip settings from the flags."""
    return Prompter(
        policy.tokenizer,
        policy.chat_template,
        policy.geometry,
        cfg.question_type,
        ClipSettings(cfg.fps, cfg.max_frames, cfg.min_pixels, cfg.max_pixels),
        max_prompt_length=min(cfg.max_prompt_length, policy.text.config.max_position_embeddings),
        **options,
    )


def make_optimizer(cfg: Config, policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in policy.model.parameters() if p.requires_grad],
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        weight_decay=cfg.weight_decay,
        fused=True,  # otherwise AdamW makes copies as large as its states
    )


def rate(cfg: Config, step: int) -> float:
    """The learning rate of a step (from 1): linear warm-up, then linear decay to 0 at the end."""
    warm = min(1.0, step / (cfg.warmup_steps + 1))
    return cfg.learning_rate * warm * (1 - (step - 1) / cfg.max_steps)


@phase("update")
def optimizer_step(
    cfg: Config, policy: Policy, optimizer: torch.optim.Optimizer, loss: float, learning_rate: float
) -> tuple[float, bool]:
    """One optimizer step on the accumulated gradients. Returns their norm, and whether it and the
    loss are finite; if not, the update is skipped. The same on every rank."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:  # no group had a gradient; momentum still moves the weights
            parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for options in optimizer.param_groups:
            options["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite
