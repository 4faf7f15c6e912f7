"""What the forms of the objective change on the events toy: one table, one figure.

    python -m benchmarks.ablations --settings none official --seeds 0 1 2 --jobs 2

Each run is an ordinary `python twgrpo.py --toy events` on one thread; the runs of a seed share
their clips, their model and the order of questions. The same command makes only the runs that are
missing. If one fails, the others go on, and the exit code is 1. Writes OUT.json and OUT.png.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import numpy as np
import torch

import events
import toy
from benchmarks.origin import PROJECT, Results, provenance, table
from files import json_lines
from tools import curves

BASE = "none"  # the mean over all tokens, unweighted; every other setting is compared with it
MEAN_1 = dict(normalize_token_weights=True)  # weights with mean 1: only their allocation differs
SETTINGS = {
    "none": dict(token_weights="none"),
    "null": dict(alpha=1.0001),  # differs from none by chance alone
    "grpo": dict(loss_type="grpo"),
    "official": {},
    "official_mean_1": MEAN_1,
    "ended_excluded": MEAN_1 | dict(ended_rows="exclude"),
    "textbook": MEAN_1 | dict(divergence="textbook"),
    "entropy": MEAN_1 | dict(token_weights="entropy"),
    "position": MEAN_1 | dict(token_weights="position"),
    "shuffled": MEAN_1 | dict(token_weights="shuffled"),
    "none_trained_vision": dict(token_weights="none", freeze_vision_modules=False),
}
# The mean over the steps of the soft accuracy of the training samples: the area under that curve.
PRIMARY = "area"
DESCRIBED = {  # title: the measure and its digits
    "held-out accuracy": ("sampled", 3),
    "with shuffled frames": ("shuffled_frames", 3),
    "tokens of a completion": ("completion_length", 1),
    "spread of lengths": ("length_spread", 2),
    "range of weights": ("weight_range", 3),
}


class Runs:
    """The runs in a work directory, each a process of its own, started from a pool of threads."""

    def __init__(self, work: Path):
        self.work, self.stopped = work.resolve(), False
        self.children: list[Popen] = []

    def call(self, *arguments: str) -> None:
        """Runs Python in a child. Raises RuntimeError with the end of its stderr if it fails."""
        pipes = dict(cwd=PROJECT, stdout=DEVNULL, stderr=PIPE, text=True)
        one_thread = os.environ | dict(OMP_NUM_THREADS="1")
        child = Popen([sys.executable, *arguments], env=one_thread, **pipes)
        self.children.append(child)
        if self.stopped:
            child.kill()
        _, complaint = child.communicate()
        if child.returncode:
            raise RuntimeError(f"exit code {child.returncode}: {complaint[-500:].strip()}")

    def make_world(self, seed: int) -> None:
        """The clips and the model that the runs of a seed share, unless they are there."""
        world = self.work / f"seed{seed}" / "world"
        if not toy.is_world(world, "events", seed):
            code = "import sys, toy; from pathlib import Path; "
            code += "toy.prepare(Path(sys.argv[1]), int(sys.argv[2]), 'events')"
            self.call("-c", code, str(world), str(seed))

    def make(self, world: Future, setting: str, seed: int, max_steps: int) -> dict:
        """The measures of one run, in the world that another thread makes."""
        world.result()
        out = self.work / f"seed{seed}" / setting
        shutil.rmtree(out, ignore_errors=True)  # of a run that was killed
        out.mkdir()
        (out / "toy").symlink_to(out.parent / "world")
        flags = dict(toy="events", seed=seed, output_dir=out, max_steps=max_steps)
        flags |= dict(save_steps=max_steps, save_only_model=True, eval_on_start=False)
        flags |= SETTINGS[setting]
        self.call("twgrpo.py", *(f"--{name}={value}" for name, value in flags.items()))
        return measures_of(out)

    def make_all(self, keys: list[dict], results: Results, jobs: int) -> None:
        """A row for every run that is missing, also for one that fails."""
        keys = [key for key in keys if not results.find(**key)]
        with ThreadPoolExecutor(jobs) as pool:
            try:
                seeds = dict.fromkeys(key["seed"] for key in keys)
                worlds = {seed: pool.submit(self.make_world, seed) for seed in seeds}
                futures = {pool.submit(self.make, worlds[key["seed"]], **key): key for key in keys}
                for future in as_completed(futures):
                    results.measure(lambda f=future, **_: f.result(), **futures[future])
            finally:  # Ctrl-C in a terminal reaches the children too, a signal to this process not
                self.stopped = True
                for child in self.children:
                    child.kill()
                pool.shutdown(cancel_futures=True)


def measures_of(out: Path) -> dict:
    """A finished run: accuracies in [0, 1], tokens, weights; the curve has 20 points.

    The spread of lengths, (longest - shortest) / mean, and the range of weights, where all
    completions are alive, are means over the groups in completions.jsonl: one a step.
    """
    rows = curves.read_metrics(out)
    evaluated = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    accuracy = np.array([row["rewards/accuracy"] for row in rows])
    spreads, ranges = [], []
    for _, group in json_lines((out / "completions.jsonl").read_bytes()):
        lengths = [len(completion["token_ids"]) for completion in group["completions"]]
        spreads.append((max(lengths) - min(lengths)) / np.mean(lengths))
        ranges.append(np.ptp(group["weights"][: min(lengths)]))
    return dict(
        area=accuracy.mean(),
        final=accuracy[-len(rows) // 10 :].mean(),
        sampled=evaluated["after"]["sampled"]["soft"],
        shuffled_frames=evaluated["after"]["shuffled frames"]["soft"],
        completion_length=np.mean([row["completion_length"] for row in rows]),
        length_spread=np.mean(spreads),
        weight_range=np.mean(ranges),
        eval=evaluated,
        curve=[part.mean() for part in np.array_split(accuracy, min(20, len(rows)))],
    )


# --------------------------------------------------------------------------------------- statistics


def student(df: int) -> tuple[np.ndarray, np.ndarray]:
    """Student's t with `df` degrees of freedom: values of |t|, and the probability of smaller ones.
    With t = sqrt(df) tan(a), the density over the angle a is proportional to cos(a)^(df - 1)."""
    angles = np.linspace(0, np.pi / 2, 100_001)[:-1]
    heights = np.cos(angles) ** (df - 1)
    below = np.concatenate([[0], np.cumsum(heights[1:] + heights[:-1])])
    return np.sqrt(df) * np.tan(angles), below / below[-1]


def paired(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean, half-width of its 95 % confidence interval, and two-sided p-value of a paired t-test;
    NaN for what fewer than two differences do not tell."""
    n = len(differences)
    if n < 2:
        return differences[0] if n else np.nan, np.nan, np.nan
    mean, error = differences.mean(), differences.std(ddof=1) / n**0.5
    t_values, below = student(n - 1)
    p = 1 - np.interp(abs(mean) / error, t_values, below) if error else float(mean == 0)
    return mean, np.interp(0.95, below, t_values) * error, p


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """The p-values adjusted for as many comparisons by Holm's step-down method, without NaNs."""
    known = {name: p for name, p in p_values.items() if np.isfinite(p)}
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(known, key=known.get)):
        largest = max(largest, min(1.0, (len(known) - rank) * known[name]))
        adjusted[name] = largest
    return adjusted


def values(rows: list[dict], setting: str, measure: str) -> dict[int, float]:
    """A measure of a setting, by seed, without the runs that failed."""
    own = [row for row in rows if row["setting"] == setting and "failed" not in row]
    return {row["seed"]: row[measure] for row in own}


def differences(rows: list[dict], setting: str, measure: str) -> np.ndarray:
    """A measure of a setting less that of BASE, for every seed that has both."""
    own, base = values(rows, setting, measure), values(rows, BASE, measure)
    return np.array([own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())])


# ------------------------------------------------------------------------------------ what is shown


def names_of(rows: list[dict]) -> list[str]:
    """The settings with a finished run, BASE at the end."""
    return sorted((name for name in SETTINGS if values(rows, name, PRIMARY)), key=BASE.__eq__)


def mean(rows: list[dict], setting: str, measure: str, digits: int = 3) -> str:
    return f"{np.mean(list(values(rows, setting, measure).values())):.{digits}f}"


def compare(rows: list[dict]) -> list[dict]:
    """A line for each setting: means over its seeds of area and final accuracy, and differences to
    BASE over the seeds that both have, with 95 % confidence intervals. p is that of the area,
    adjusted by Holm for all settings; the intervals are not adjusted."""
    names = names_of(rows)
    adjusted = holm({name: paired(differences(rows, name, PRIMARY))[2] for name in names[:-1]})
    lines = []
    for name in names:
        lines.append({"setting": name, "seeds": len(differences(rows, name, PRIMARY))})
        for measure in (PRIMARY, "final"):
            lines[-1][measure] = mean(rows, name, measure)
            if name != BASE:
                change, half, _ = paired(differences(rows, name, measure))
                lines[-1][f"{measure} less {BASE}"] = f"{change:+.3f} ± {half:.3f}"
            if measure == PRIMARY and name in adjusted:
                p = adjusted[name]
                lines[-1]["p"] = f"{p:.3f}" if p >= 0.001 else "< 0.001"
    return lines


def describe(rows: list[dict]) -> list[dict]:
    """A line for each setting: means over its seeds of what else was measured."""
    return [
        {"setting": name} | {title: mean(rows, name, *of) for title, of in DESCRIBED.items()}
        for name in names_of(rows)
    ]


def draw(rows: list[dict], path: str) -> None:
    """Learning curves, and the primary outcome's differences to BASE, as a PNG."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    names = names_of(rows)
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    looks = [dict(color=c, linestyle=s) for s, c in product(curves.STYLES, curves.COLOURS)]
    for place, (name, look) in enumerate(zip(names, looks, strict=False)):
        curve = np.mean(list(values(rows, name, "curve").values()), axis=0)
        left.plot((np.arange(len(curve)) + 0.5) / len(curve), curve, label=name, **look)
        if name != BASE:
            change, half, _ = paired(differences(rows, name, PRIMARY))
            right.errorbar(change, place, xerr=half, fmt="o", capsize=3, color=look["color"])
    left.set(xlabel="share of training", title="soft accuracy of the training samples")
    left.legend()
    right.axvline(0, color="0.6")
    right.set_yticks(range(len(names) - 1), names[:-1])
    right.invert_yaxis()
    right.set(title=f"{PRIMARY} less that of {BASE}, 95 % confidence interval")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--max_steps", type=int, default=events.DEFAULTS["max_steps"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    work = Path(f"runs/ablations-{provenance()['commit']}")  # another commit's models may differ
    parser.add_argument("--work_dir", type=Path, default=work)
    parser.add_argument("--out", help="files, without their suffix (all, in the work directory)")
    args = parser.parse_args()
    out = args.out or args.work_dir / "all"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    torch.set_num_threads(1)  # as in the runs, for the record
    results = Results(Path(f"{out}.json"))
    asked = dict.fromkeys(product(args.seeds, args.settings))
    keys = [dict(setting=name, seed=k, max_steps=args.max_steps) for k, name in asked]
    try:
        Runs(args.work_dir).make_all(keys, results, args.jobs)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command makes what is missing") from None
    rows = [row for row in results.rows if row["max_steps"] == args.max_steps]
    if not values(rows, BASE, PRIMARY):
        raise SystemExit(f"no run of {BASE} to compare with; add it to --settings")
    print(table(compare(rows)), table(describe(rows)), sep="\n\n")
    draw(rows, f"{out}.png")
    raise SystemExit(int(any("failed" in row for row in rows)))


if __name__ == "__main__":
    main()
