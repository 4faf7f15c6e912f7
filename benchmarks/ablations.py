"""What the settings of the objective change on the embedded default: one table, one figure.

    python -m benchmarks.ablations --settings alpha_1 alpha_1.7 --seeds 0 1 2 --jobs 2

Each run is an ordinary `python twgrpo.py` on one thread. The same command makes only the runs that
are missing. If one fails, the others go on, and the exit code is 1. Writes OUT.json, .md and .png.
"""

import argparse
import json
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import numpy as np
import torch

import toy
from benchmarks.origin import PROJECT, Results, table
from tools import curves

BASE = "alpha_1"  # token-normalised GRPO: all weights are 1
SETTINGS = {
    "grpo": dict(loss_type="grpo", alpha=1.0),
    "alpha_1": dict(loss_type="tw_grpo", alpha=1.0),
    "null": dict(loss_type="tw_grpo", alpha=1.0001),  # the control: differs by chance alone
    "alpha_1.4": dict(loss_type="tw_grpo", alpha=1.4),
    "alpha_1.7": dict(loss_type="tw_grpo", alpha=1.7),
    "alpha_2": dict(loss_type="tw_grpo", alpha=2.0),
    "exclude": dict(loss_type="tw_grpo", alpha=1.7, ended_rows="exclude"),
    "textbook": dict(loss_type="tw_grpo", alpha=1.7, divergence="textbook"),
}
PAIRED = ("training_accuracy", "sampled_soft")  # whose differences to BASE are shown
MEASURES = (*PAIRED, "greedy_soft", "wrong_video_soft", "completion_length", "weight_mean")


class Runs:
    """The runs in a work directory, each a process of its own, started from a pool of threads."""

    def __init__(self, work: Path):
        self.work, self.stopped = work.resolve(), False
        self.children: list[Popen] = []

    def make(self, setting: str, seed: int, max_steps: int) -> dict:
        """The measures of one run. Raises RuntimeError with the end of its stderr if it fails."""
        out = self.work / f"seed{seed}" / setting
        shutil.rmtree(out, ignore_errors=True)  # of a run that was killed
        out.mkdir()
        (out / "toy").symlink_to(out.parent / "world")
        flags = dict(max_steps=max_steps, save_steps=max_steps, save_only_model=True)
        flags |= SETTINGS[setting] | dict(seed=seed, output_dir=out)
        command = [sys.executable, "twgrpo.py", *(f"--{k}={v}" for k, v in flags.items())]
        child = Popen(command, cwd=PROJECT, stdout=DEVNULL, stderr=PIPE, text=True)
        self.children.append(child)
        if self.stopped:
            child.kill()
        _, complaint = child.communicate()
        if child.returncode:
            raise RuntimeError(f"exit code {child.returncode}: {complaint[-500:].strip()}")
        return measures_of(out)

    def make_all(self, keys: list[dict], results: Results, jobs: int) -> None:
        """A row for every run that is missing, also for one that fails."""
        keys = [key for key in keys if not results.find(**key)]
        for seed in {key["seed"] for key in keys}:
            if not (self.work / f"seed{seed}" / "world").exists():
                toy.prepare(self.work / f"seed{seed}" / "world", seed)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                futures = {pool.submit(self.make, **key): key for key in keys}
                for future in as_completed(futures):
                    results.measure(lambda f=future, **_: f.result(), **futures[future])
            finally:  # Ctrl-C in a terminal reaches the children too, a signal to this process not
                self.stopped = True
                for child in self.children:
                    child.kill()
                pool.shutdown(cancel_futures=True)


def measures_of(out: Path) -> dict:
    """A finished run: shares in [0, 1], tokens, weights; the curve has 20 points."""
    rows = curves.read_metrics(out)
    evaluated = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    accuracy = np.array([row["rewards/accuracy"] for row in rows])
    return dict(
        training_accuracy=accuracy.mean(),
        sampled_soft=evaluated["after"]["sampled"]["soft"],
        greedy_soft=evaluated["after"]["greedy"]["soft"],
        wrong_video_soft=evaluated["after"]["wrong video"]["soft"],
        completion_length=np.mean([row["completion_length"] for row in rows[-len(rows) // 10 :]]),
        weight_mean=np.mean([row["weight_mean"] for row in rows]),
        eval=evaluated,
        curve=[part.mean() for part in np.array_split(accuracy, min(20, len(rows)))],
    )


def values_of(rows: list[dict], setting: str, measure: str) -> np.ndarray:
    """A measure of a setting for every seed; NaN where the run failed."""
    of = {(row["setting"], row["seed"]): row.get(measure, np.nan) for row in rows}
    return np.array([of.get((setting, seed), np.nan) for seed in sorted({s for _, s in of})])


def cell(values: np.ndarray, sign: str = "") -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return "none"
    mean, low, high = (f"{x:{sign}.3f}" for x in (known.mean(), known.min(), known.max()))
    return f"{mean}<br>{low} to {high}"


def compare(rows: list[dict]) -> list[dict]:
    """A line of the table for each setting; a difference stands right of what it is one of."""
    lines = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        lines.append(dict(setting=name))
        for measure in MEASURES:
            values = values_of(rows, name, measure)
            lines[-1][measure] = cell(values)
            if measure in PAIRED:
                difference = values - values_of(rows, BASE, measure)
                lines[-1][f"{measure} - {BASE}"] = cell(difference, "+")
    return lines


def markdown(data: dict, name: str) -> str:
    """The page: `data` is what the file of `Results` holds."""
    rows, machine = data["rows"], data["machine"]
    seeds = sorted({row["seed"] for row in rows})
    failed = [f"{row['setting']}, seed {row['seed']}" for row in rows if "failed" in row]
    return f"""# Ablation on the toy

`python -m benchmarks.ablations`: {len(rows)} runs of {rows[0]["max_steps"]} steps, seeds {seeds};
failed: {"; ".join(failed) or "none"}. Commit {data["commit"]}, {data["date"]}, {machine["cores"]}
cores of {machine["cpu"]}. [How to read it](README.md#the-ablation).

<!-- computed: tests/test_ablations.py::test_the_committed_table_follows_from_the_numbers -->
{table(compare(rows))}

![Learning curves]({name}.png)
"""


def draw(rows: list[dict], path: str) -> None:
    """Learning curves as a PNG."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(row["setting"] for row in rows):
        curve = np.mean([row["curve"] for row in rows if row["setting"] == name], axis=0)
        axis.plot(np.linspace(0, 1, len(curve)), curve, label=name)
    axis.set(xlabel="share of training", title="accuracy reward, mean over seeds")
    axis.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--max_steps", type=int, default=toy.DEFAULTS["max_steps"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--out", default="runs/ablations/all", help="files, without their suffix")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    torch.set_num_threads(1)  # a world's numbers depend on it; its runs do the same
    results = Results(Path(f"{args.out}.json"))
    keys = [dict(setting=name, seed=k) for k in args.seeds for name in args.settings]
    keys = [key | dict(max_steps=args.max_steps) for key in keys]
    try:
        Runs(args.work_dir).make_all(keys, results, args.jobs)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command makes what is missing") from None
    rows = [row for row in results.rows if row["max_steps"] == args.max_steps]
    page = markdown(results.about | dict(rows=rows), Path(args.out).name)
    Path(f"{args.out}.md").write_text(page, encoding="utf-8")
    draw([row for row in rows if "failed" not in row], f"{args.out}.png")
    raise SystemExit(int(any("failed" in row for row in rows)))


if __name__ == "__main__":
    main()
