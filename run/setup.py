"""What a run is made of before its first step: policy, prompts, optimizer and its schedule."""

import torch

from data import Prompter
from model import ranks
from model.policy import Policy
from run.config import Config


def load_policy(cfg: Config, freeze_all: bool = False) -> Policy:
    """The model of --model_name_or_path on this rank's device, or its share of it."""
    device, several = ranks.start(), ranks.world() > 1
    place = "cpu" if several else device
    policy = Policy.load(
        cfg.model_name_or_path, place, cfg.freeze_vision_modules, cfg.attn_implementation
    )
    if freeze_all:
        policy.model.requires_grad_(False)
    elif cfg.gradient_checkpointing:
        policy.checkpoint_activations()
    if several:
        policy.shard(device)
    return policy


def make_prompter(cfg: Config, policy: Policy, **options) -> Prompter:
    """Questions as this model reads them, their clips shown as the flags say."""
    return Prompter(
        policy.tokenizer, policy.chat_template, policy.geometry, cfg.question_type,
        cfg.fps, cfg.max_frames, cfg.min_pixels, cfg.max_pixels,
        max_prompt_length=policy.longest_prompt(cfg.max_prompt_length), **options,
    )  # fmt: skip


def make_optimizer(cfg: Config, policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in policy.model.parameters() if p.requires_grad],
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        weight_decay=cfg.weight_decay,
        fused=policy.device.type == "cuda",  # elsewhere AdamW makes copies as large as its states
    )


def rate(cfg: Config, step: int) -> float:
    """The learning rate of a step (from 1): linear warm-up, then linear to 0 after max_steps."""
    warm = min(1.0, step / (cfg.warmup_steps + 1))
    return cfg.learning_rate * warm * (1 - (step - 1) / cfg.max_steps)
