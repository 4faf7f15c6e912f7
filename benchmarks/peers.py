"""One training step beside TRL's GRPOTrainer and the official way, on the same machine.

    python -m benchmarks.peers --rounds 5 --json benchmarks/peers.json

TRL and Liger go into an environment of their own (`pip install trl liger-kernel`) beside the
requirements of this project; without them their rows are left out.

ours      as `benchmarks.step`
official  as `benchmarks.step`: eight padded copies, all logits at once
TRL       GRPOTrainer on the same model, AdamW and lengths; its prompt is text, as long as ours with
          its video, so TRL runs no vision tower
TRL, Liger loss   the same with `use_liger_kernel` for the loss alone

Every way runs in a process of its own, all ways in turn, `--rounds` times. A round's time is the
median of `--repeats` steps after a first one that is not counted. Shown are the median of the
rounds, the fastest and slowest of them, and the largest memory of the process (ru_maxrss), which
includes Python and its libraries. Nothing of the trainers' logging or saving is on.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import step
from benchmarks.origin import PROJECT, Results
from run.config import Config

COLUMNS = dict(way="", step_s=".2f", fastest_s=".2f", slowest_s=".2f", times_ours=".1f",
               peak_gb=".2f", rounds="")  # fmt: skip
NEEDS = {"ours": (), "official": (), "TRL": ("trl",), "TRL, Liger loss": ("trl", "liger_kernel")}
LIGER_PATCHES = dict.fromkeys(  # Triton kernels, which need a GPU: only the loss is compared
    ("rope", "mrope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy"), False
)


def trainer_seconds(args: argparse.Namespace, liger: bool) -> list[float]:
    """Seconds of each step of TRL's GRPOTrainer, after its first."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    policy, ask = step.build("tiny", args.prompt, "cpu")
    tokenizer, G, T = policy.tokenizer, args.num_generations, args.completion
    word = tokenizer.encode("What")
    prompt = tokenizer.decode(word * (len(ask().ids_P) // len(word)))
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            ends.append(time.perf_counter())

    config = GRPOConfig(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        per_device_train_batch_size=G,
        num_generations=G,
        max_completion_length=T,
        generation_kwargs=dict(min_new_tokens=T),
        max_steps=args.repeats + 1,
        learning_rate=1e-9,
        beta=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        use_liger_kernel=liger,
        liger_kernel_config=LIGER_PATCHES if liger else None,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    GRPOTrainer(
        model=policy.model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(g) for g in range(len(completions))],
        args=config,
        train_dataset=Dataset.from_list([dict(prompt=prompt)] * (args.repeats + 1)),
        callbacks=[Clock()],
    ).train()
    return [after - before for before, after in zip(ends, ends[1:], strict=False)]


def own_seconds(args: argparse.Namespace, way: str) -> list[float]:
    """Seconds of each of our steps, or of the official ones, after the first."""
    policy, ask = step.build("tiny", args.prompt, "cpu")
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)
    cfg = Config(num_generations=args.num_generations, max_completion_length=args.completion)
    phases = step.Phases()
    for repeat in range(args.repeats + 1):
        step.WAYS[way](cfg, policy, ask, optimizer, phases if repeat else step.Phases())
    return [sum(s) for s in zip(*(phases.seconds[name] for name in step.PHASES), strict=True)]


def child(args: argparse.Namespace) -> None:
    """Measures one way once; the last line it prints is JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        if args.way.startswith("TRL"):
            seconds = trainer_seconds(args, liger="Liger" in args.way)
        else:
            seconds = own_seconds(args, args.way)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    print(json.dumps(dict(step_s=statistics.median(seconds), peak_gb=peak / 1e9)))


def one_round(way: str, args: argparse.Namespace) -> dict:
    """What a child of its own measured of that way. Raises RuntimeError if it failed."""
    command = [sys.executable, "-m", "benchmarks.peers", "--way", way]
    for name in ("prompt", "completion", "num_generations", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or ["failed"])[-1])
    return json.loads(result.stdout.splitlines()[-1])


def summary(rounds: list[dict], ours: list[dict]) -> dict:
    """Median, range and memory of the rounds; how many times the median of ours."""
    seconds, base = ([r["step_s"] for r in rows] for rows in (rounds, ours))
    return dict(
        step_s=statistics.median(seconds),
        fastest_s=min(seconds),
        slowest_s=max(seconds),
        times_ours=statistics.median(seconds) / statistics.median(base) if base else None,
        peak_gb=max(r["peak_gb"] for r in rounds),
        rounds=len(rounds),
    )


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    top.add_argument("--rounds", type=int, default=5, help="processes of each way")
    top.add_argument("--repeats", type=int, default=3, help="steps of a process that count")
    top.add_argument("--prompt", type=int, default=600, help="tokens of the prompt, about")
    top.add_argument("--completion", type=int, default=64, help="tokens of each completion")
    top.add_argument("--num_generations", type=int, default=8)
    top.add_argument("--json", type=Path, help="write the results to this file, round by round")
    top.add_argument("--way", choices=NEEDS, help=argparse.SUPPRESS)
    return top


def main() -> None:
    args = parser().parse_args()
    if args.way:
        return child(args)
    ways = [way for way, needs in NEEDS.items() if all(map(find_spec, needs))]
    for way in (way for way in NEEDS if way not in ways):
        print(f"left out, not installed: {way} ({', '.join(NEEDS[way])})")
    results, rounds = Results(args.json, COLUMNS), {way: [] for way in ways}
    lengths = dict(
        prompt=args.prompt, completion=args.completion, num_generations=args.num_generations
    )
    for _ in range(args.rounds):
        for way in ways:
            try:
                rounds[way].append(one_round(way, args))
                results.add(dict(way=way, **lengths), summary(rounds[way], rounds["ours"]))
            except RuntimeError as error:
                results.add(dict(way=way, **lengths), dict(failed=str(error)))
    print(results.json())


if __name__ == "__main__":
    main()
