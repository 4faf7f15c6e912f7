"""The files a run leaves behind, apart from its checkpoints.

    config.json         the flags
    metrics.jsonl       one line every logging_steps, the mean over them
    completions.jsonl   one group every logging_steps, with rewards, advantages and token weights

Metric names follow TRL where it has one. Letters as in twgrpo.py: B questions, G completions, K
reward functions.
"""

import dataclasses
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import Record
from kernels import HeadOutput
from policy import Group


class RunLog:
    """Collects the measurements of a run and writes them. `cfg` is a twgrpo.Config."""

    def __init__(self, cfg, directory: Path):
        self.cfg, self.dir = cfg, directory
        self.report = make_reporter(cfg, directory)
        config = json.dumps(dataclasses.asdict(cfg), indent=2)
        (directory / "config.json").write_text(config + "\n", encoding="utf-8")
        self.metrics_file = open(directory / "metrics.jsonl", "a", encoding="utf-8")
        self.completions_file = open(directory / "completions.jsonl", "a", encoding="utf-8")
        self.values: dict[str, list[float]] = defaultdict(list)  # since the last line
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens = self.steps = 0
        self.skipped, self.skipped_ids, self.trained = 0, set(), 0  # since the start

    @contextmanager
    def phase(self, name: str):
        """Counts the time spent inside as time/<name>, seconds."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start

    def add(self, **values) -> None:
        for name, value in values.items():
            self.values[name].append(float(value))

    def skip(self, record: Record, error: Exception) -> None:
        """A question left out because its clip cannot be read; named the first time."""
        self.skipped += 1
        if record.id not in self.skipped_ids:
            self.skipped_ids.add(record.id)
            tqdm.write(f"skipped question {record.id}: {error}", file=sys.stderr)

    def iteration(self, loss: Tensor, grad_norm: Tensor, outputs: list[HeadOutput]) -> None:
        """What one optimizer step measured."""
        self.add(
            loss=loss.detach(),
            grad_norm=grad_norm,
            kl=mean([o.kl for o in outputs]),
            clip_ratio=mean([o.clip_ratio for o in outputs]),
        )

    def groups(
        self,
        step: int,
        groups: list[Group],
        rewards_BGK: Tensor,
        advantages_BG: Tensor,
        outputs: list[HeadOutput],
    ) -> None:
        """What a step's completions measured at their first scoring; keeps one group as sample."""
        names, reward_BG = self.cfg.reward_funcs, rewards_BGK.sum(-1)
        std_B = reward_BG.std(1)
        lengths_BG = torch.stack([g.lengths_G for g in groups]).float()
        scored = list(zip(groups, outputs, strict=True))
        self.add(
            reward=reward_BG.mean(),
            reward_std=std_B.mean(),
            frac_reward_zero_std=(std_B == 0).float().mean(),
            **{f"rewards/{name}": rewards_BGK[..., k].mean() for k, name in enumerate(names)},
            completion_length=lengths_BG.mean(),
            truncated_frac=mean([not done for g in groups for done in g.finished]),
            divergence_mean=mean([o.divergence_T.mean() for o in outputs]),
            weight_mean=mean([o.weights_T.mean() for o in outputs]),
            weight_mean_all_alive=mean(
                [o.weights_T[: int(g.lengths_G.min())].mean() for g, o in scored]
            ),
            # The rollout's opinion of its tokens against the scoring's, same weights: numerics
            # only.
            sampling_logp_difference=mean(
                [(g.sampled_logps_N - o.logps_N.cpu()).abs().mean() for g, o in scored]
            ),
        )
        self.tokens += int(lengths_BG.sum())
        self.trained += len(groups)
        if step % self.cfg.logging_steps == 0:
            row = sample_row(step, groups[0], rewards_BGK[0], advantages_BG[0], outputs[0], names)
            self.completions_file.write(json.dumps(row) + "\n")
            self.completions_file.flush()

    def end_step(self, step: int, bar: tqdm) -> None:
        """Shows the step (counted from 1) and, every logging_steps, writes the line."""
        self.steps += 1
        if "reward" in self.values:
            reward, std, length = (
                self.values[name][-1] for name in ("reward", "reward_std", "completion_length")
            )
            phases = " ".join(f"{name} {s / self.steps:.2f}" for name, s in self.seconds.items())
            bar.set_postfix_str(
                f"reward {reward:.2f} std {std:.2f} length {length:.0f}, s: {phases}", refresh=False
            )
        if step % self.cfg.logging_steps == 0 or step == self.cfg.max_steps:
            self.write(step)

    def write(self, step: int) -> None:
        """The line of metrics.jsonl for the steps since the last; none if there were none."""
        if not self.steps:
            return
        row = {name: mean(values) for name, values in self.values.items()}
        row |= {f"time/{name}": seconds / self.steps for name, seconds in self.seconds.items()}
        row["tokens_per_second"] = self.tokens / max(sum(self.seconds.values()), 1e-9)
        row["peak_memory_gb"] = peak_memory_gb()
        row["skipped"] = self.skipped
        self.metrics_file.write(json.dumps({"step": step, **row}) + "\n")
        self.metrics_file.flush()
        self.report(row, step)
        self.values.clear()
        self.seconds.clear()
        self.tokens = self.steps = 0


def sample_row(
    step: int,
    group: Group,
    rewards_GK: Tensor,
    advantages_G: Tensor,
    output: HeadOutput,
    reward_names: list[str],
) -> dict:
    """One group as completions.jsonl holds it. D_t and w_t belong to positions, logps to tokens."""
    record = group.question.record
    logps = output.logps_N.cpu().split(group.lengths_G.tolist())
    return dict(
        step=step,
        id=record.id,
        problem=record.problem,
        solution=record.solution,
        video=str(record.video),
        divergence=rounded(output.divergence_T),
        weights=rounded(output.weights_T),
        completions=[
            dict(
                text=group.texts[i],
                token_ids=group.completions[i].tolist(),
                logps=rounded(logps[i]),
                advantage=round(float(advantages_G[i]), 6),
                rewards={
                    name: float(r) for name, r in zip(reward_names, rewards_GK[i], strict=True)
                },
            )
            for i in range(len(group.completions))
        ],
    )


def make_reporter(cfg, directory: Path) -> Callable[[dict, int], None]:
    """Where metrics also go. Raises ImportError naming the package if it is missing."""
    if cfg.report_to == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("--report_to tensorboard needs: pip install tensorboard") from None
        writer = SummaryWriter(str(directory / "tensorboard"))

        def report(row: dict, step: int) -> None:
            for name, value in row.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return report
    if cfg.report_to == "wandb":
        try:
            import wandb
        except ImportError:
            raise ImportError("--report_to wandb needs: pip install wandb") from None
        run = wandb.init(dir=str(directory), name=directory.name, config=dataclasses.asdict(cfg))
        return lambda row, step: run.log(row, step=step)
    return lambda row, step: None


def mean(values: list) -> float:
    return float(sum(float(v) for v in values) / len(values)) if values else math.nan


def rounded(values: Tensor) -> list[float]:
    return [round(v, 6) for v in values.tolist()]


def peak_memory_gb() -> float:
    """Peak memory of this process so far, 1e9 bytes: on the GPU if there is one, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
