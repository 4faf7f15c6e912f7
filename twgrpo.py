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

import copy
import dataclasses
import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

import toy
import video
import viz
from data import DataError, Prompter, Question, Record, load_records, select_records, step_records
from eval import evaluate
from kernels import HeadOutput, token_logps, tw_grpo_head
from policy import Group, ModelError, Policy
from rewards import REWARDS
from runlog import RunLog


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
    per_device_train_batch_size: int = flag(1, "B, questions per step")
    freeze_vision_modules: bool = flag(True, "leave the vision tower as it is")
    # Bookkeeping
    seed: int = flag(42, "of data order, sampling and the toy")
    save_steps: int = flag(100, "steps between checkpoints")
    logging_steps: int = flag(1, "steps between lines of metrics.jsonl")
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", "metrics also go there")

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
            "--fps must be above 0": self.fps > 0,
            "--max_frames must be at least 2, one temporal patch": self.max_frames >= 2,
            "--min_pixels must be in 1..max_pixels": 0 < self.min_pixels <= self.max_pixels,
            "--reward_funcs needs at least one reward": len(self.reward_funcs) > 0,
            "--model_name_or_path and --jsonl_path go together; neither means the toy": (
                (self.model_name_or_path is None) == (self.jsonl_path is None)
            ),
        }
        for name in ("max_completion_length", "num_iterations", "max_steps", "save_steps",
                     "per_device_train_batch_size", "logging_steps", "train_samples"):  # fmt: skip
            rules[f"--{name} must be at least 1"] = getattr(self, name) >= 1
        for name in self.reward_funcs:
            rules[f"--reward_funcs knows {', '.join(REWARDS)}, not {name!r}"] = name in REWARDS
        for message, holds in rules.items():
            if not holds:
                raise ConfigError(message)


# ------------------------------------------------------------------------------------ the algorithm


def group_advantages(rewards_BG: Tensor) -> Tensor:
    """A_i = (r_i - mean r) / (std r + 1e-4) within each question's group: (B, G); std has ddof = 1.

    A group whose rewards are all equal has advantage 0 and teaches nothing.
    """
    mean_B1, std_B1 = rewards_BG.mean(1, keepdim=True), rewards_BG.std(1, keepdim=True)
    return (rewards_BG - mean_B1) / (std_B1 + 1e-4)


def train(
    cfg: Config, policy: Policy, records: list[Record], prompter: Prompter, log: RunLog
) -> int:
    """The loop. Returns the steps done: max_steps, or fewer if a signal asked to stop."""
    reference = frozen_copy(policy) if cfg.beta > 0 else None
    optimizer, schedule = make_optimizer(cfg, policy)
    stop = StopSignal()
    bar = tqdm(range(1, cfg.max_steps + 1), desc="training")

    for step in bar:
        with log.phase("data"):
            questions, seeds = load_questions(cfg, step, records, prompter, log)
        if questions:
            with log.phase("rollout"):
                with torch.no_grad():
                    features = policy.encode_videos(questions)
                groups = policy.rollout(
                    questions, features, cfg.num_generations, cfg.max_completion_length,
                    cfg.temperature, seeds,
                )  # fmt: skip
            rewards_BGK = score_completions(cfg, groups)
            advantages_BG = group_advantages(rewards_BGK.sum(-1))

            old_logps = ref_logps = [None] * len(groups)
            for iteration in range(cfg.num_iterations):
                with log.phase("score"):
                    if reference and iteration == 0:
                        ref_logps = reference_logps(cfg, reference, groups)
                    if not policy.vision_is_frozen:
                        features = policy.encode_videos(questions)  # again, for its gradient
                    hidden = policy.hidden_states(groups, features)
                    outputs = [
                        question_loss(cfg, policy, *inputs)
                        for inputs in zip(
                            groups, hidden, advantages_BG, old_logps, ref_logps, strict=True
                        )
                    ]
                    loss = torch.stack(
                        [o.loss for o in outputs]
                    ).mean()  # each question counts 1 / B
                with log.phase("update"):
                    loss.backward()
                    grad_norm = torch.nn.utils.clip_grad_norm_(
                        policy.model.parameters(), cfg.max_grad_norm
                    )
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                if iteration == 0:
                    old_logps = [o.logps_N for o in outputs]  # of the weights that sampled
                    log.groups(step, groups, rewards_BGK, advantages_BG, outputs)
                log.iteration(loss, grad_norm, outputs)

        log.add(learning_rate=schedule.get_last_lr()[0])
        schedule.step()
        log.end_step(step, bar)
        if log.skipped >= len(records) and not log.trained:
            raise DataError(f"{cfg.jsonl_path}: none of the first {log.skipped} clips can be read")
        if stop.requested or step == cfg.max_steps or step % cfg.save_steps == 0:
            log.write(step)
            save_checkpoint(policy, log.dir, step, cfg.model_name_or_path)
        if stop.requested:
            break
    return step


def question_loss(
    cfg: Config,
    policy: Policy,
    group: Group,
    hidden_ND: Tensor,
    advantages_G: Tensor,
    old_logps_N: Tensor | None,
    ref_logps_N: Tensor | None,
) -> HeadOutput:
    """The loss of one question from the hidden states that predict its completion tokens."""
    device = hidden_ND.device
    return tw_grpo_head(
        hidden_ND,
        policy.head_VD.to(hidden_ND.dtype),
        group.targets_N.to(device),
        group.lengths_G.to(device),
        advantages_G.to(device),
        old_logps_N=old_logps_N,
        ref_logps_N=ref_logps_N,
        alpha=cfg.alpha,
        eps_low=cfg.epsilon,
        eps_high=cfg.epsilon_high,
        beta=cfg.beta,
        temperature=cfg.temperature,
        loss_type=cfg.loss_type,
        divergence=cfg.divergence,
        ended_rows=cfg.ended_rows,
    )


def score_completions(cfg: Config, groups: list[Group]) -> Tensor:
    """The rewards of every completion: (B, G, K), K in the order of cfg.reward_funcs."""
    return torch.tensor(
        [
            [[REWARDS[name](text, g.question.record.solution) for name in cfg.reward_funcs]
             for text in g.texts]
            for g in groups
        ]
    )  # fmt: skip


def frozen_copy(policy: Policy) -> Policy:
    """The reference model: the policy as it is before training."""
    model = copy.deepcopy(policy.model).requires_grad_(False)
    return Policy(model, policy.tokenizer, policy.chat_template)


@torch.no_grad()
def reference_logps(cfg: Config, reference: Policy, groups: list[Group]) -> list[Tensor]:
    """Log-probs of the completions under the reference: B x (N,)."""
    features = reference.encode_videos([group.question for group in groups])
    return [
        token_logps(h, reference.head_VD.to(h.dtype), group.targets_N.to(h.device), cfg.temperature)
        for h, group in zip(reference.hidden_states(groups, features), groups, strict=True)
    ]


def make_optimizer(cfg: Config, policy: Policy):
    """AdamW, and its learning rate: linear warm-up, then linear to 0 at max_steps."""
    optimizer = torch.optim.AdamW(
        [p for p in policy.model.parameters() if p.requires_grad],
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        weight_decay=cfg.weight_decay,
    )

    def rate(k: int) -> float:
        return min(1.0, (k + 1) / (cfg.warmup_steps + 1)) * max(0.0, 1 - k / cfg.max_steps)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def load_questions(
    cfg: Config, step: int, records: list[Record], prompter: Prompter, log: RunLog
) -> tuple[list[Question], list[tuple[int, ...]]]:
    """The step's questions, and for each the seed of its sampling.

    A clip that cannot be read costs its question: it is counted and named, and no other clip takes
    its place. Seeds hang on the question's place in the step, so the others stay as they were.
    """
    questions, seeds = [], []
    chosen = step_records(records, step - 1, cfg.per_device_train_batch_size, cfg.seed)
    for slot, record in enumerate(chosen):
        try:
            questions.append(prompter(record))
            seeds.append((cfg.seed, step, slot))
        except video.VideoError as error:
            log.skip(record, error)
    return questions, seeds


def save_checkpoint(policy: Policy, run: Path, step: int, model_name_or_path: str) -> None:
    """run/checkpoint-STEP, an ordinary Hugging Face checkpoint; written beside, then renamed."""
    final, partial = run / f"checkpoint-{step}", run / f".checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    policy.save(partial, processor_from=model_name_or_path)
    os.replace(partial, final)


class StopSignal:
    """Ctrl-C or SIGTERM: finish the step, save and leave. A second Ctrl-C interrupts at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
    """A directory for this run and no other. Raises ConfigError if it cannot be had."""
    if cfg.output_dir is not None:
        directory = Path(cfg.output_dir)
        if (directory / "metrics.jsonl").exists() or (directory / "toy").exists():
            raise ConfigError(f"--output_dir {directory} already holds a run; choose another")
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
    except OSError as error:
        raise ConfigError(f"--output_dir {directory} cannot be made: {error.strerror}") from None
    return directory


def measure(cfg: Config, policy: Policy, prompter: Prompter, records: list[Record]) -> dict:
    """Sampled and greedy accuracy, and sampled with the wrong video as a control."""
    common = dict(max_completion_length=cfg.max_completion_length, seed=cfg.seed)
    sampled = dict(temperature=cfg.temperature, num_generations=cfg.num_generations, **common)
    return {
        "sampled": evaluate(policy, prompter, records, **sampled),
        "greedy": evaluate(policy, prompter, records, temperature=0.0, **common),
        "wrong video": evaluate(policy, prompter, records, wrong_video=True, **sampled),
    }


def print_measures(before: dict, after: dict, count: int) -> None:
    print(f"\n{count} held-out questions    soft accuracy     exact accuracy    format")
    print(f"{'':20}" + "    before   after" * 3)
    for name in before:
        pairs = [(before[name][key], after[name][key]) for key in ("soft", "exact", "format")]
        print(f"{name:20}" + "".join(f"    {a:6.3f}  {b:6.3f}" for a, b in pairs))


def run(cfg: Config) -> Path:
    """Everything from the flags to the curves. Returns the output directory."""
    directory = make_output_dir(cfg)
    torch.manual_seed(cfg.seed)
    transformers_logging.disable_progress_bar()

    is_toy = cfg.model_name_or_path is None
    if is_toy:
        print("No --model_name_or_path: training the embedded toy, which sets these flags:")
        print("  " + " ".join(f"--{name} {value}" for name, value in toy.DEFAULTS.items()))
        model, train_path, test_path = toy.prepare(directory / "toy", cfg.seed)
        cfg = dataclasses.replace(
            cfg,
            model_name_or_path=str(model),
            jsonl_path=str(train_path),
            eval_jsonl_path=str(test_path),
            video_root=str(directory / "toy"),
        )

    records = load_records(cfg.jsonl_path, cfg.video_root)
    records = select_records(records, cfg.question_type, cfg.train_samples, cfg.seed)
    held_out = load_records(cfg.eval_jsonl_path, cfg.video_root) if cfg.eval_jsonl_path else []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = Policy.load(cfg.model_name_or_path, device, cfg.freeze_vision_modules)
    prompter = Prompter(
        policy.tokenizer, policy.chat_template, policy.geometry, cfg.question_type,
        cfg.fps, cfg.max_frames, cfg.min_pixels, cfg.max_pixels,
    )  # fmt: skip
    log = RunLog(cfg, directory)

    before = measure(cfg, policy, prompter, held_out) if held_out else {}
    steps = train(cfg, policy, records, prompter, log)
    viz.curves([directory], directory / "curves.png")
    if held_out and steps == cfg.max_steps:
        after = measure(cfg, policy, prompter, held_out)
        measures = json.dumps({"before": before, "after": after}, indent=2)
        (directory / "eval.json").write_text(measures + "\n", encoding="utf-8")
        print_measures(before, after, len(held_out))
        if is_toy:
            print("A toy shows that the loop works, not that TW-GRPO beats GRPO.")
    print(f"\n{steps} steps done; see {directory}/curves.png and {directory}/checkpoint-{steps}")
    return directory


def main() -> None:
    try:
        run(parse_config())
    except (ConfigError, DataError, ModelError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
