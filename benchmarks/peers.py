"""One training step beside TRL's GRPOTrainer and the official way, on the same CPU.

    python -m benchmarks.peers --rounds 5 --json benchmarks/peers.json

Every way runs in a process of its own, all in turn, `--rounds` times. TRL and Liger are optional.
README.md says what the ways do, and what a row holds.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from benchmarks import step
from benchmarks.origin import Results, table

NEEDS = {"ours": (), "official": (), "TRL": ("trl",), "TRL, Liger loss": ("trl", "liger_kernel")}
LIGER_KERNELS = "rope mrope rms_norm swiglu cross_entropy fused_linear_cross_entropy".split()


def trainer_seconds(args: argparse.Namespace, liger: bool) -> float:
    """Median seconds of a step of TRL's GRPOTrainer, after its first."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    policy, ask, _ = step.build("tiny", args.prompt, "cpu")
    tokenizer, G, T = policy.tokenizer, args.num_generations, args.completion
    word = tokenizer.encode("What")
    prompt = tokenizer.decode(word * (len(ask().ids_P) // len(word)))
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            ends.append(time.perf_counter())

    sizes = dict(per_device_train_batch_size=G, num_generations=G, max_completion_length=T)
    plain = dict(beta=0.0, gradient_checkpointing=False, bf16=False, use_cpu=True)
    quiet = dict(save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
    if liger:  # its Triton kernels need a GPU: only the loss is compared
        off = dict.fromkeys(LIGER_KERNELS, False)
        plain |= dict(use_liger_kernel=True, liger_kernel_config=off)
    config = GRPOConfig(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        generation_kwargs=dict(min_new_tokens=T),
        max_steps=args.repeats + 1,
        learning_rate=1e-9,
        **sizes | plain | quiet,
    )
    GRPOTrainer(
        model=policy.model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(g) for g in range(len(completions))],
        args=config,
        train_dataset=Dataset.from_list([dict(prompt=prompt)] * (args.repeats + 1)),
        callbacks=[Clock()],
    ).train()
    return statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))


def measure(way: str, args: argparse.Namespace) -> dict:
    """Median seconds of a step, and the largest memory of this process, GB (1e9 bytes)."""
    if way.startswith("TRL"):
        seconds = trainer_seconds(args, liger="Liger" in way)
    else:
        flags = dict(num_generations=args.num_generations, max_completion_length=args.completion)
        seconds = step.measure(way, "tiny", args.prompt, args.repeats, **flags)["step_s"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return dict(step_s=seconds, peak_gb=peak / 1e9)


def one_round(way: str, args: argparse.Namespace) -> dict:
    """What a new process measures of that way."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, way, args).result()


def summary(rounds: list[dict], ours: list[dict]) -> dict:
    """Median, range and memory of the rounds; how many times the median of ours."""
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
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    top.add_argument("--rounds", type=int, default=5, help="processes of each way")
    top.add_argument("--repeats", type=int, default=3, help="steps of a process that count")
    top.add_argument("--prompt", type=int, default=600, help="tokens of the prompt, about")
    top.add_argument("--completion", type=int, default=64, help="tokens of each completion")
    top.add_argument("--num_generations", type=int, default=8)
    top.add_argument("--json", type=Path, help="write the results to this file, round by round")
    args = top.parse_args()
    ways = [way for way, needs in NEEDS.items() if all(map(find_spec, needs))]
    for way in NEEDS.keys() - ways:
        print(f"left out, not installed: {way} ({', '.join(NEEDS[way])})")
    results, rounds = Results(args.json), {way: [] for way in ways}
    for way in args.rounds * ways:
        rounds[way].append(one_round(way, args))
        key = dict(way=way, prompt=args.prompt, completion=args.completion)
        key |= dict(num_generations=args.num_generations)
        results.add(key, summary(rounds[way], rounds["ours"]))
    print(table(results.rows))


if __name__ == "__main__":
    main()
