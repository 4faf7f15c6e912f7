"""Compares a training step with TRL's GRPOTrainer and the official method, on the same CPU.

    python -m benchmarks.peers --rounds 5 --json benchmarks/peers.json

The methods take turns, each in its own process, for `--rounds` rounds. TRL is optional. README.md
says what each method does and what a row holds.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from benchmarks import step
from benchmarks.origin import Results, table
from run.log import peak_memory_gb

SHAPE = dict(prompt=600, num_generations=8, max_completion_length=64)  # prompt: tokens, about
STEPS = 3  # timed steps per process, after one warm-up step


def trainer_seconds(prompt: int, num_generations: int, max_completion_length: int) -> float:
    """Median seconds per step of TRL's GRPOTrainer, excluding the first."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    policy, ask, _ = step.build("tiny", prompt, "cpu")
    word = policy.tokenizer.encode("What")
    text = policy.tokenizer.decode(word * (len(ask().ids_P) // len(word)))
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            ends.append(time.perf_counter())

    sizes = dict(num_generations=num_generations, max_completion_length=max_completion_length)
    plain = dict(beta=0.0, gradient_checkpointing=False, bf16=False, use_cpu=True)
    quiet = dict(save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
    config = GRPOConfig(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        per_device_train_batch_size=num_generations,
        generation_kwargs=dict(min_new_tokens=max_completion_length),
        max_steps=STEPS + 1,
        learning_rate=1e-9,
        **sizes | plain | quiet,
    )
    GRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        reward_funcs=lambda completions, **_: [float(g) for g in range(len(completions))],
        args=config,
        train_dataset=Dataset.from_list([dict(prompt=text)] * (STEPS + 1)),
        callbacks=[Clock()],
    ).train()
    return statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))


def measure(way: str, shape: dict) -> dict:
    """Median seconds per step, and the peak memory of this process in GB (1e9 bytes)."""
    if way == "TRL":
        seconds = trainer_seconds(**shape)
    else:
        seconds = step.measure(way, "tiny", repeats=STEPS, **shape)["step_s"]
    return dict(step_s=seconds, peak_gb=peak_memory_gb())


def one_round(way: str, shape: dict) -> dict:
    """Measures a method in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, way, shape).result()


def summary(rounds: list[dict], ours: list[dict]) -> dict:
    """Median, range and peak memory of the rounds, and the median relative to ours."""
    seconds, base = ([r["step_s"] for r in rows] for rows in (rounds, ours))
    return dict(
        step_s=statistics.median(seconds),
        fastest_s=min(seconds),
        slowest_s=max(seconds),
        times_ours=statistics.median(seconds) / statistics.median(base),
        peak_gb=max(r["peak_gb"] for r in rounds),
        rounds=len(rounds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="processes per method")
    parser.add_argument("--json", type=Path, help="write the results to this file, round by round")
    args = parser.parse_args()
    ways = ["ours", "official", "TRL"] if find_spec("trl") else ["ours", "official"]
    results, rounds = Results(args.json), {way: [] for way in ways}
    for way in args.rounds * ways:
        rounds[way].append(one_round(way, SHAPE))
        results.add(dict(way=way) | SHAPE, summary(rounds[way], rounds["ours"]))
    print(table(results.rows), "" if find_spec("trl") else "left out, not installed: TRL")


if __name__ == "__main__":
    main()
