"""The files that a run writes, apart from its checkpoints.

    config.json         the flags, and their earlier values if the run was resumed with others
    metrics.jsonl       one line per step: means over its questions
    completions.jsonl   one group per step, with rewards, advantages and token weights

Metric names follow TRL where it has them. Letters as in twgrpo.py: B questions, G completions, K
reward functions.
"""

import json
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import files
from files import printable
from kernels import HeadOutput
from model import ranks
from model.packing import Group
from run.config import Config, settings_of

COUNTERS = ("asked", "skipped", "nonfinite")  # questions and updates since the start, all ranks
SHOWN = ("reward", "reward_std", "completion_length")  # next to the progress bar
MAXIMA = ("sampling_logp_difference_max", "peak_memory_gb")  # over questions and ranks
SECONDS: dict[str, float] = defaultdict(float)  # per phase of this step


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Adds the time spent inside to time/<name>, in seconds. Also works as a decorator."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    SECONDS[name] += time.perf_counter() - start


class RunLog:
    """Collects a run's measurements on every rank; the first rank writes them.

    `resumed` is the dict from `checkpoint.to_resume`. Means are over questions, so that a rank with
    fewer of them does not distort them.
    """

    def __init__(self, cfg: Config, directory: Path, resumed: dict | None = None):
        self.cfg, self.dir, resumed = cfg, directory, resumed or {}
        self.counts = {name: resumed.get(name, 0) for name in COUNTERS}
        self.failures = 0  # consecutive non-finite updates
        self.values: dict[str, list[float]] = defaultdict(list)  # per metric, in this step
        SECONDS.clear()
        self.named: set[str] = set()
        if ranks.is_main():
            settings = settings_of(cfg) | {"history": resumed.get("history", [])}
            files.write_json(directory / "config.json", settings)
            move_aside_later_rows(directory, resumed.get("step", 0))
            by_line = dict(mode="a", buffering=1, encoding="utf-8")
            self.metrics_file = open(directory / "metrics.jsonl", **by_line)
            self.completions_file = open(directory / "completions.jsonl", **by_line)

    def add(self, **values: float) -> None:
        """Adds to the mean of each metric, or to its maximum if its name is in MAXIMA."""
        for name, value in values.items():
            self.values[name].append(float(value))

    def note(self, key: str, message: str) -> None:
        """Prints a line on the terminal, once per key."""
        if key not in self.named:
            self.named.add(key)
            tqdm.write(printable(message), file=sys.stderr)

    def not_finite(self, step: int, groups: list[Group], loss: float) -> None:
        """Reports the questions behind a non-finite loss or gradient. All ranks must call it."""
        bad = [g.question.record.id for g in groups if not g.old_logps_N.isfinite().all()]
        bad = bad or [g.question.record.id for g in groups]
        everyones = [name for names in ranks.gather(bad) for name in names]
        if ranks.is_main():
            text = f"step {step}: loss {loss} or its gradient is not finite; weights unchanged"
            self.note(f"step {step}", f"{text} (questions {', '.join(everyones)})")

    def reason_to_end(self, step: int) -> str | None:
        """Why the run cannot continue, or None. The same on every rank."""
        asked, skipped = self.counts["asked"], self.counts["skipped"]
        if self.failures >= 3:
            return f"{self.failures} updates in a row were not finite"
        allowed = self.cfg.max_skip_fraction
        if skipped > allowed * max(asked, 100):  # one bad clip in the first ten is no trend
            return (
                f"{skipped} of {asked} clips could not be read, more than "
                f"--max_skip_fraction {allowed} allows"
            )
        if step == self.cfg.max_steps and skipped == asked:
            return f"none of {asked} clips could be read"
        return None

    def progress(self, steps: range) -> tqdm:
        shown = dict(initial=steps.start - 1, total=self.cfg.max_steps)
        self.bar = tqdm(steps, "training", disable=not ranks.is_main(), **shown)
        return self.bar

    def step(
        self,
        step: int,
        groups: list[Group],
        updates: list,
        rate: float,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Logs a training step; `updates` are twgrpo.Update objects. All ranks must call it."""
        for group, output in zip(groups, updates[0].outputs if updates else (), strict=True):
            self.scored(group, output)
        for update in updates:
            for output in update.outputs:
                self.add(kl=output.kl, clip_ratio=output.clip_ratio)
            self.failures = 0 if update.finite else self.failures + 1
            if update.finite:
                self.add(loss=update.loss, grad_norm=update.grad_norm)
            else:
                self.counts["nonfinite"] += 1
                self.not_finite(step, groups, update.loss)
        self.add(learning_rate=rate)
        means = {name: fmean(self.values[name]) for name in SHOWN if name in self.values}
        self.bar.set_postfix(means | SECONDS, refresh=False)
        if groups and ranks.is_main():
            row = self.completions_row(step, groups[0], updates[0].outputs[0], tokenizer)
            self.completions_file.write(json.dumps(row) + "\n")
        self.write(step)

    def scored(self, group: Group, output: HeadOutput) -> None:
        """Adds the metrics of a question's completions, from when they were first scored."""
        reward_G, lengths_G = group.rewards_GK.sum(-1), group.lengths_G
        names = [f"rewards/{name}" for name in self.cfg.reward_funcs]
        drift_N = (group.sampled_logps_N - output.logps_N.cpu()).abs()
        self.add(
            reward=reward_G.mean(),
            reward_std=reward_G.std(),
            frac_reward_zero_std=reward_G.std() == 0,
            **dict(zip(names, group.rewards_GK.mean(0), strict=True)),
            completion_length=lengths_G.float().mean(),
            truncated_frac=1 - fmean(group.finished),
            divergence_mean=output.divergence_T.mean(),
            weight_mean=output.weights_T.mean(),
            weight_mean_all_alive=output.weights_T[: int(lengths_G.min())].mean(),
            # How unequal the weights are. Their range would say nothing: the official rule always
            # stretches it to 1..alpha within each group.
            weight_std=output.weights_T.std(correction=0),
            # Log-probs from the rollout against those from scoring: only numerical error.
            sampling_logp_difference=drift_N.mean(),
            sampling_logp_difference_p99=drift_N.quantile(0.99),
            sampling_logp_difference_max=drift_N.max(),
        )

    def completions_row(
        self, step: int, group: Group, output: HeadOutput, tokenizer: PreTrainedTokenizerBase
    ) -> dict:
        """One group for completions.jsonl. D_t and w_t are per position, logps per token.

        `tokens` are decoded one by one, including special ones, so that each can be shown with its
        numbers; a character whose bytes are split over several tokens becomes U+FFFD in each.
        """
        record = group.question.record
        logps = output.logps_N.cpu().split(group.lengths_G.tolist())
        completions = zip(
            group.texts, group.completions, logps, group.advantages_G, group.rewards_GK, strict=True
        )
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
                    text=text,
                    token_ids=ids.tolist(),
                    tokens=tokenizer.batch_decode(ids[:, None]),
                    logps=rounded(logps_i),
                    advantage=round(float(advantage), 6),
                    rewards=dict(zip(self.cfg.reward_funcs, rewards_K.tolist(), strict=True)),
                )
                for text, ids, logps_i, advantage, rewards_K in completions
            ],
        )

    def write(self, step: int) -> None:
        """Writes a line of metrics.jsonl. All ranks must call it."""
        self.add(**{f"time/{name}": seconds for name, seconds in SECONDS.items()})
        self.add(peak_memory_gb=peak_memory_gb())
        values = defaultdict(list)
        for of_rank in ranks.gather(self.values):
            for name, of_name in of_rank.items():
                values[name] += of_name
        if ranks.is_main():
            row = {"step": step}
            for name, everyones in values.items():
                mean = sum(everyones) / len(everyones)
                row[name] = max(everyones) if name in MAXIMA else mean
            tokens = sum(values["completion_length"]) * self.cfg.num_generations
            row["tokens_per_second"] = tokens / max(sum(SECONDS.values()), 1e-9)
            row |= {name: self.counts[name] for name in ("skipped", "nonfinite")}
            self.metrics_file.write(json.dumps(row) + "\n")
        self.values.clear()
        SECONDS.clear()


def move_aside_later_rows(run: Path, step: int) -> None:
    """Moves log lines written after `step`, and any line cut off by a kill, to NAME.after-STEP.

    What stays are the lines that an uninterrupted run would have.
    """
    for path in (run / "metrics.jsonl", run / "completions.jsonl"):
        kept, later = [], []
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            whole = re.match(rb'\{"step": ([0-9]+),.*\n', line)
            (kept if whole and int(whole[1]) <= step else later).append(line)
        if later:
            with open(run / f"{path.name}.after-{step}", "ab") as aside:
                aside.writelines(later)
            with files.replacing(path) as beside:
                beside.write_bytes(b"".join(kept))


def rounded(values: Tensor) -> list[float]:
    return [round(v, 6) for v in values.tolist()]


def peak_memory_gb() -> float:
    """Peak memory of this process so far, in 1e9 bytes: on the GPU if there is one, else RSS."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
