"""Train a video-language model with TW-GRPO: token-weighted group relative policy optimization.

    python twgrpo.py                  the embedded default: tiny model, synthetic clips, no GPU
    python twgrpo.py --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct --jsonl_path train.json ...

One step of `train`, below (the paper: arXiv 2505.24718):
    1. take the step's questions, and encode each video once    policy.Policy.encode_videos
    2. sample G completions of each question                    policy.Policy.rollout
    3. reward each completion: soft accuracy + format           rewards.py
    4. compare within the group: A = (r - mean) / std           group_advantages
    5. score the completions, one packed row per question       policy.Policy.hidden_states
    6. weigh each position by how much the group disagrees
       there, and take the clipped, weighted loss               kernels.tw_grpo_head
    7. step the optimizer

Letters in shapes: B questions of a step, G completions of each, K reward functions, N completion
tokens of a question, D hidden size.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

import checkpoint
import plan
import ranks
import toy
import video
import viz
from checkpoint import CheckpointError
from data import DataError, Prompter, Question, Record, load_records, select_records, step_records
from eval import evaluate
from kernels import HeadOutput, token_logps, tw_grpo_head
from loader import ClipWorkers
from policy import Group, ModelError, Policy
from rewards import REWARDS
from runlog import RunLog


class RunError(Exception):
    """A run that cannot go on. The message says why and what was saved."""


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
    # Bookkeeping
    seed: int = flag(42, "of data order, sampling and the toy")
    save_steps: int = flag(100, "steps between checkpoints")
    logging_steps: int = flag(1, "steps between lines of metrics.jsonl")
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", "metrics also go there")
    save_only_model: bool = flag(False, "checkpoints without what resuming needs")
    resume_from_checkpoint: str | None = flag(None, "a checkpoint, or auto: the run's newest")
    dataloader_num_workers: int = flag(4, "processes that decode clips ahead; 0: decode in line")
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
                     "train_samples"):  # fmt: skip
            rules[f"--{name} must be at least 1"] = getattr(self, name) >= 1
        for name in ("alpha", "beta", "temperature", "learning_rate", "epsilon_high", "fps"):
            rules[f"--{name} must be finite"] = math.isfinite(getattr(self, name))
        for name in self.reward_funcs:
            rules[f"--reward_funcs knows {', '.join(REWARDS)}, not {name!r}"] = name in REWARDS
        for message, holds in rules.items():
            if not holds:
                raise ConfigError(message)


# ------------------------------------------------------------------------------------ the algorithm


def group_advantages(rewards_G: Tensor) -> Tensor:
    """A_i = (r_i - mean r) / (std r + 1e-4) over the group: (G,); std has ddof = 1.

    A group whose rewards are all equal has advantage 0 and teaches nothing.
    """
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + 1e-4)


def train(
    cfg: Config,
    policy: Policy,
    records: list[Record],
    prompter: Prompter,
    log: RunLog,
    resume: Path | None = None,
) -> int:
    """The loop, the same on every rank. Returns the steps done: max_steps, or fewer on a signal."""
    reference = load_policy(cfg, freeze_all=True) if cfg.beta > 0 else None
    optimizer = make_optimizer(cfg, policy)
    step = go_on_from(resume, policy, optimizer, log) if resume else 0
    ahead = QuestionsAhead(cfg, records, prompter, log, step + 1)
    failures, silent = 0, not ranks.is_main()
    bar = tqdm(
        range(step + 1, cfg.max_steps + 1), "training", cfg.max_steps, initial=step, disable=silent
    )

    with StopSignal() as stop, contextlib.closing(ahead):
        for step in bar:
            with log.phase("data"):
                questions, seeds = ahead.take(step)
            with log.phase("rollout"), policy.gathered() as actor:
                groups = sample_groups(cfg, actor, questions, seeds)
            for group in groups:
                group.rewards_GK = rewards_of(cfg, group)
                group.advantages_G = group_advantages(group.rewards_GK.sum(-1))

            count = ranks.total(len(groups))  # questions of this step, on all ranks
            if reference and count:
                score_reference(cfg, reference, groups, log)
            for _ in range(cfg.num_iterations if count else 0):
                loss = backward(cfg, policy, groups, count, step, log)
                updated = update(cfg, policy, optimizer, step, loss, log)
                failures = 0 if updated else failures + 1
                if not updated:
                    name_the_question(groups, step, loss, log)

            log.add(learning_rate=rate(cfg, step))
            log.end_step(step, bar)
            ending = reason_to_end(cfg, log, step, failures)
            leaving = ending or ranks.agree(stop.requested) or step == cfg.max_steps
            if leaving or step % cfg.save_steps == 0:
                log.write(step)
                saved = checkpoint.save(
                    policy, optimizer, log.counters(), log.dir, step,
                    cfg.model_name_or_path, cfg.save_only_model,
                )  # fmt: skip
            if ending:
                raise RunError(f"{ending}; {saved} holds the run so far")
            if leaving:
                break
    return step


def sample_groups(
    cfg: Config, actor: Policy, questions: list[Question], seeds: list[tuple[int, ...]]
) -> list[Group]:
    """G completions of each question; each video is encoded once, and kept if it stays the same."""
    if not questions:
        return []
    with torch.no_grad():
        features = actor.encode_videos(questions)
    groups = actor.rollout(
        questions, features, cfg.num_generations, cfg.max_completion_length, cfg.temperature, seeds
    )
    if cfg.freeze_vision_modules:
        for group, tokens in zip(groups, features, strict=True):
            group.features = tokens
    return groups


def rewards_of(cfg: Config, group: Group) -> Tensor:
    """The rewards of each completion: (G, K), K in the order of cfg.reward_funcs."""
    solution = group.question.record.solution
    return torch.tensor(
        [[REWARDS[name](text, solution) for name in cfg.reward_funcs] for text in group.texts]
    )


def micro_batches(cfg: Config, groups: list[Group]) -> list[list[Group]]:
    """At most B groups each. On several ranks always the same number of them, some perhaps empty,
    because every one is a round of collectives."""
    B = cfg.per_device_train_batch_size
    chunks = [groups[k : k + B] for k in range(0, B * cfg.gradient_accumulation_steps, B)]
    return chunks if ranks.world() > 1 else [chunk for chunk in chunks if chunk]


def backward(
    cfg: Config, policy: Policy, groups: list[Group], count: float, step: int, log: RunLog
) -> float:
    """The gradient of the mean loss over the step's `count` questions, on all ranks; the loss.

    Each question counts 1 / count, however the questions are spread over ranks and micro-batches.
    """
    total = 0.0
    for chunk in micro_batches(cfg, groups):
        with log.phase("score"):
            loss, outputs = policy.run(score, cfg, policy, chunk)
        with log.phase("update"):
            # FSDP averages gradients over the ranks; we want their sum over the questions.
            (loss * (ranks.world() / count)).backward()
        total += loss.item()
        if chunk and chunk[0].old_logps_N is None:
            log.scored(step, chunk, outputs)
            if chunk[0] is groups[0]:
                log.sample(step, chunk[0], outputs[0], policy.tokenizer)
            for group, output in zip(chunk, outputs, strict=True):
                group.old_logps_N = output.logps_N  # from now on, the ratio is to these
        for output in outputs:
            log.add(kl=output.kl, clip_ratio=output.clip_ratio)
    return ranks.total(total) / count


def score(cfg: Config, policy: Policy, groups: list[Group]) -> tuple[Tensor, list[HeadOutput]]:
    """The summed loss of some questions, and what was measured.

    Without a question the loss is 0 and so is its gradient, but every parameter has taken part in
    it: the other ranks wait for each of them.
    """
    scored = groups or [idle_group(policy)]
    hidden = policy.hidden_states(scored, video_tokens(policy, scored))
    outputs = [question_loss(cfg, policy, *pair) for pair in zip(scored, hidden, strict=True)]
    return torch.stack([o.loss for o in outputs]).sum(), outputs if groups else []


def idle_group(policy: Policy) -> Group:
    """A group without advantage, and so without gradient."""
    group = policy.idle_group()
    group.advantages_G = torch.zeros(1)
    return group


def video_tokens(policy: Policy, groups: list[Group]) -> list[Tensor]:
    """The rollout's, if it kept them because the vision tower is frozen; else with gradient."""
    if groups[0].features is None:
        return policy.encode_videos([group.question for group in groups])
    return [group.features for group in groups]


def question_loss(cfg: Config, policy: Policy, group: Group, hidden_ND: Tensor) -> HeadOutput:
    """The loss of one question from the hidden states that predict its completion tokens."""
    device, dtype = hidden_ND.device, policy.compute_dtype
    return tw_grpo_head(
        hidden_ND.to(dtype),
        policy.head_VD.to(dtype),
        group.targets_N.to(device),
        group.lengths_G.to(device),
        group.advantages_G.to(device),
        old_logps_N=group.old_logps_N,
        ref_logps_N=group.ref_logps_N,
        alpha=cfg.alpha,
        eps_low=cfg.epsilon,
        eps_high=cfg.epsilon_high,
        beta=cfg.beta if group.ref_logps_N is not None else 0.0,
        temperature=cfg.temperature,
        loss_type=cfg.loss_type,
        divergence=cfg.divergence,
        ended_rows=cfg.ended_rows,
    )


@torch.no_grad()
def score_reference(cfg: Config, reference: Policy, groups: list[Group], log: RunLog) -> None:
    """Puts the log-probs under the reference model into each group."""

    def score_chunk(chunk: list[Group]) -> None:
        hidden = reference.hidden_states(chunk, video_tokens(reference, chunk))
        for group, hidden_ND in zip(chunk, hidden, strict=True):
            dtype, targets = reference.compute_dtype, group.targets_N.to(hidden_ND.device)
            group.ref_logps_N = token_logps(
                hidden_ND.to(dtype), reference.head_VD.to(dtype), targets, cfg.temperature
            )

    with log.phase("score"):
        for chunk in micro_batches(cfg, groups):
            reference.run(score_chunk, chunk or [reference.idle_group()])


def update(
    cfg: Config, policy: Policy, optimizer: torch.optim.Optimizer, step: int, loss: float, log
) -> bool:
    """One optimizer step from the gradients that have gathered; False: they were not finite, and
    the weights are left as they are. The same on every rank."""
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), cfg.max_grad_norm)
    norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate(cfg, step)
        optimizer.step()
        log.add(loss=loss, grad_norm=norm)
    else:
        log.nonfinite += 1
    optimizer.zero_grad(set_to_none=True)
    return finite


def rate(cfg: Config, step: int) -> float:
    """The learning rate of a step (from 1): linear warm-up, then linear to 0 after max_steps."""
    warm = min(1.0, step / (cfg.warmup_steps + 1))
    return cfg.learning_rate * warm * (1 - (step - 1) / cfg.max_steps)


def make_optimizer(cfg: Config, policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in policy.model.parameters() if p.requires_grad],
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        weight_decay=cfg.weight_decay,
        fused=policy.device.type == "cuda",  # elsewhere AdamW makes copies as large as its states
    )


# ----------------------------------------------------------------------------- around the algorithm


class QuestionsAhead:
    """This rank's questions of each step, their clips decoded a few steps ahead of the loop.

    A clip that cannot be read costs its question: it is counted and named, and no other clip takes
    its place. A step's questions are fixed by (seed, step), and the seed of a question's sampling
    by its place in the step, so everything else stays as it was.
    """

    STEPS_AHEAD = 2

    def __init__(
        self, cfg: Config, records: list[Record], prompter: Prompter, log: RunLog, first_step: int
    ):
        self.cfg, self.records, self.prompter, self.log = cfg, records, prompter, log
        self.workers = ClipWorkers(cfg.dataloader_num_workers, cfg.clip_timeout)
        self.next_step, self.submitted = first_step, deque()

    def _submit(self, step: int) -> None:
        mine = self.cfg.per_device_train_batch_size * self.cfg.gradient_accumulation_steps
        chosen = step_records(self.records, step - 1, mine * ranks.world(), self.cfg.seed)
        first = ranks.rank() * mine
        slots = range(first, first + mine)
        self.submitted.append(
            [(k, chosen[k], self.workers.submit(*self.prompter.clip_arguments(chosen[k])))
             for k in slots]
        )  # fmt: skip

    def take(self, step: int) -> tuple[list[Question], list[tuple[int, ...]]]:
        ahead = self.STEPS_AHEAD if self.cfg.dataloader_num_workers else 0
        while self.next_step <= min(step + ahead, self.cfg.max_steps):
            self._submit(self.next_step)
            self.next_step += 1
        questions, seeds, asked = [], [], self.submitted.popleft()
        for slot, record, clip in asked:
            try:
                questions.append(self.prompter.question(record, clip.result()))
                seeds.append((self.cfg.seed, step, slot, 1))  # 1: no other stream ends so
            except video.VideoError as error:
                self.log.note(str(record.video), f"skipped question {record.id}: {error}")
        mine = (len(asked), len(asked) - len(questions))
        asked, skipped = (sum(values) for values in zip(*ranks.gather(mine), strict=True))
        self.log.asked += asked
        self.log.skipped += skipped
        self.log.trained += asked - skipped
        return questions, seeds

    def close(self) -> None:
        self.workers.close()


def name_the_question(groups: list[Group], step: int, loss: float, log: RunLog) -> None:
    """Says which questions a step with a loss or gradient that is not finite was about."""
    bad = [g.question.record.id for g in groups if not g.old_logps_N.isfinite().all()]
    bad = bad or [g.question.record.id for g in groups]
    everyones = [name for names in ranks.gather(bad) for name in names]
    if ranks.is_main():
        text = f"step {step}: loss {loss} or its gradient is not finite; weights left as they are"
        log.note(f"step {step}", f"{text} (questions {', '.join(everyones)})")


def reason_to_end(cfg: Config, log: RunLog, step: int, failures: int) -> str | None:
    """Why the run cannot go on, in words, or None. The same on every rank."""
    if step == cfg.max_steps and not log.trained:
        return f"no question was trained on: none of {log.asked} clips could be read"
    if failures >= 3:
        return f"{failures} updates in a row were not finite"
    if log.skipped > cfg.max_skip_fraction * max(log.asked, 100):  # one bad clip in ten is no trend
        return (
            f"{log.skipped} of {log.asked} clips could not be read, more than "
            f"--max_skip_fraction {cfg.max_skip_fraction} allows"
        )
    return None


def go_on_from(path: Path, policy: Policy, optimizer: torch.optim.Optimizer, log: RunLog) -> int:
    """Takes up parameters, optimizer and counters; returns the steps that are done."""
    counters = checkpoint.load(path, policy, optimizer)
    done = counters.pop("step")
    for name, value in counters.items():
        setattr(log, name, value)
    if ranks.is_main():
        print(f"going on from {path}, after step {done}")
    return done


class StopSignal:
    """Ctrl-C or SIGTERM: finish the step, save and leave the loop. A second one acts at once."""

    def __enter__(self):
        self.requested = False
        self.before = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self.requested = True
        self.__exit__()
        name = signal.Signals(number).name
        tqdm.write(f"{name}: finishing the step, then saving; Ctrl-C to stop now", file=sys.stderr)


# --------------------------------------------------------------------------------------------- main


def parse_config(arguments: list[str] | None = None) -> Config:
    """Flags to a checked Config. Without a model, toy.DEFAULTS replace the recipe's; flags win."""
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0])
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


def load_policy(cfg: Config, freeze_all: bool = False) -> Policy:
    """The model of --model_name_or_path on this rank's device, or its share of it."""
    device, several = ranks.start(), ranks.world() > 1
    policy = Policy.load(
        cfg.model_name_or_path, "cpu" if several else device, cfg.freeze_vision_modules
    )
    if freeze_all:
        policy.model.requires_grad_(False)
    elif cfg.gradient_checkpointing:
        policy.checkpoint_activations()
    if several:
        policy.shard(device)
    return policy


def measure(cfg: Config, policy: Policy, prompter: Prompter, records: list[Record]) -> dict:
    """Sampled and greedy accuracy, and sampled with the wrong video as a control. Every rank
    measures everything: none has to wait for another."""
    common = dict(max_completion_length=cfg.max_completion_length, seed=cfg.seed)
    sampled = dict(temperature=cfg.temperature, num_generations=cfg.num_generations, **common)
    with policy.gathered() as actor:
        measures = {
            "sampled": evaluate(actor, prompter, records, **sampled),
            "greedy": evaluate(actor, prompter, records, temperature=0.0, **common),
        }
        if len(records) > 1:
            measures["wrong video"] = evaluate(
                actor, prompter, records, wrong_video=True, **sampled
            )
        return measures


def write_measures(path: Path, measures: dict) -> None:
    if ranks.is_main():
        path.write_text(json.dumps(measures, indent=2) + "\n", encoding="utf-8")


def print_measures(before: dict, after: dict, count: int) -> None:
    print(f"\n{count} held-out questions    soft accuracy     exact accuracy    format")
    print(f"{'':20}" + "    before   after" * 3)
    for name in before:
        pairs = [(before[name][key], after[name][key]) for key in ("soft", "exact", "format")]
        print(f"{name:20}" + "".join(f"    {a:6.3f}  {b:6.3f}" for a, b in pairs))


def run(cfg: Config) -> Path:
    """Everything from the flags to the pictures. Returns the output directory."""
    ranks.start()
    if cfg.jsonl_path:
        training_records(cfg), held_out_records(cfg)  # before anything is written or loaded
    directory = ranks.gather(make_output_dir(cfg) if ranks.is_main() else None)[0]
    torch.manual_seed(cfg.seed)
    transformers_logging.disable_progress_bar()
    is_toy = cfg.model_name_or_path is None
    if is_toy:
        cfg = prepare_toy(cfg, directory / "toy")

    records, held_out = training_records(cfg), held_out_records(cfg)
    if cfg.dry_run:
        if ranks.is_main():
            plan.show(cfg, records)
        return directory
    resume = None
    if cfg.resume_from_checkpoint:
        resume = checkpoint.find(directory, cfg.resume_from_checkpoint)
        if ranks.is_main():
            done = int(resume.name.rpartition("-")[2]) if resume else 0
            checkpoint.move_aside_later_rows(directory, done)
        ranks.barrier()

    policy = load_policy(cfg)
    prompter = Prompter(
        policy.tokenizer, policy.chat_template, policy.geometry, cfg.question_type,
        cfg.fps, cfg.max_frames, cfg.min_pixels, cfg.max_pixels,
    )  # fmt: skip
    log = RunLog(cfg, directory)
    measures_file, measures = directory / "eval.json", {}
    if held_out and resume and measures_file.exists():
        measures = json.loads(measures_file.read_text(encoding="utf-8"))
    elif held_out:
        measures["before"] = measure(cfg, policy, prompter, held_out)
        write_measures(measures_file, measures)
    steps = train(cfg, policy, records, prompter, log, resume)
    if held_out and steps == cfg.max_steps:
        measures["after"] = measure(cfg, policy, prompter, held_out)
        write_measures(measures_file, measures)
    if ranks.is_main():
        pictures = ", ".join(map(str, viz.pictures(directory)))
        if "after" in measures:
            print_measures(measures["before"], measures["after"], len(held_out))
            if is_toy:
                print("A toy shows that the loop works, not that TW-GRPO beats GRPO.")
        print(f"\n{steps} steps done: {pictures}, {directory}/checkpoint-{steps}")
    return directory


def main() -> None:
    try:
        run(parse_config())
    except (ConfigError, DataError, ModelError, RunError, CheckpointError) as error:
        raise SystemExit(f"error: {error}") from None
    except (video.VideoError, ImportError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; what was written so far is whole") from None
    finally:
        ranks.stop()


if __name__ == "__main__":
    main()
