"""Compares forms of the objective on the events toy: one table, one figure.

    python -m benchmarks.ablations --settings none official --seeds 0 1 2 --jobs 2

Each run is an ordinary `python twgrpo.py --toy events` on one thread; runs with the same seed share
clips, model and question order. Running the command again makes only the missing runs. If one
fails, the others continue and the exit code is 1. Writes ablations.json and ablations.png in the
work directory.
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
from subprocess import DEVNULL, PIPE, run

import numpy as np
import torch

import events
import toy
from benchmarks.origin import PROJECT, Results, provenance, table
from files import json_lines, one_sentence
from tools import curves

BASE = "none"  # unweighted mean over all tokens; every other setting is compared with it
MEAN_1 = dict(normalize_token_weights=True)  # weights with mean 1 differ only in allocation
SETTINGS = {
    "none": dict(token_weights="none"),
    "null": dict(alpha=1.0001),  # differs from none only by chance
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
# Summaries of the training samples' soft accuracy curve. "area", the mean over all steps, is the
# primary outcome; "final" is the mean over the last tenth.
CURVE = ("area", "final")
DESCRIBED = {  # title: measure and number of digits
    "held-out accuracy": ("sampled", 3),
    "with shuffled frames": ("shuffled_frames", 3),
    "tokens of a completion": ("completion_length", 1),
    "spread of lengths": ("length_spread", 2),
    "range of weights": ("weight_range", 3),
}


def call(*arguments: str) -> None:
    """Runs Python in a child process on one thread. If it fails, raises RuntimeError with the end
    of its stderr."""
    pipes = dict(cwd=PROJECT, stdout=DEVNULL, stderr=PIPE, text=True)
    child = run([sys.executable, *arguments], env=os.environ | dict(OMP_NUM_THREADS="1"), **pipes)
    if child.returncode:
        raise RuntimeError(f"exit code {child.returncode}: {child.stderr[-500:].strip()}")


def make_world(work: Path, seed: int) -> Path:
    """The directory of a seed, with the clips and the model that its runs share."""
    root = work.resolve() / f"seed{seed}"
    if not toy.is_world(root / "world", "events", seed):
        call("-c", f"import toy; toy.prepare(toy.Path({str(root)!r}) / 'world', {seed}, 'events')")
    return root


def make(root: Future, setting: str, seed: int, max_steps: int) -> dict:
    """Runs one setting in its seed's directory, which another thread prepares; its measures."""
    out = root.result() / setting
    shutil.rmtree(out, ignore_errors=True)  # left over from a killed run
    out.mkdir()
    (out / "toy").symlink_to(out.parent / "world")
    flags = dict(toy="events", seed=seed, output_dir=out, max_steps=max_steps)
    flags |= dict(save_steps=max_steps, save_only_model=True, eval_on_start=False)
    flags |= SETTINGS[setting]
    call("twgrpo.py", *(f"--{name}={value}" for name, value in flags.items()))
    return measures_of(out)


def make_all(work: Path, keys: list[dict], results: Results, jobs: int) -> None:
    """Adds a row for every missing run, even if it fails. On Ctrl-C or SIGTERM, runs that have
    started finish and no others start."""
    keys = [key for key in keys if not results.find(**key)]
    with ThreadPoolExecutor(jobs) as pool:
        seeds = dict.fromkeys(key["seed"] for key in keys)
        roots = {seed: pool.submit(make_world, work, seed) for seed in seeds}
        futures = {pool.submit(make, roots[key["seed"]], **key): key for key in keys}
        try:
            for future in as_completed(futures):
                results.measure(lambda f=future, **_: f.result(), **futures[future])
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def measures_of(out: Path) -> dict:
    """Measures of a finished run: accuracies in [0, 1], tokens, weights; the curve has 20 points.

    The spread of lengths, (longest - shortest) / mean, and the range of weights where all
    completions are alive are means over the groups in completions.jsonl, one per step.
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
    """Student's t with `df` degrees of freedom: values of |t| and the probability of being below.
    With t = sqrt(df) tan(a), the density over the angle a is proportional to cos(a)^(df - 1)."""
    angles = np.linspace(0, np.pi / 2, 100_001)[:-1]
    heights = np.cos(angles) ** (df - 1)
    below = np.concatenate([[0], np.cumsum(heights[1:] + heights[:-1])])
    return np.sqrt(df) * np.tan(angles), below / below[-1]


def paired(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean, half-width of its 95 % confidence interval, and two-sided p-value of a paired t-test;
    NaN where there are too few differences."""
    n = len(differences)
    if n < 2:
        return differences[0] if n else np.nan, np.nan, np.nan
    mean, error = differences.mean(), differences.std(ddof=1) / n**0.5
    t_values, below = student(n - 1)
    p = 1 - np.interp(abs(mean) / error, t_values, below) if error else float(mean == 0)
    return mean, np.interp(0.95, below, t_values) * error, p


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """The p-values, without NaNs, adjusted for multiple comparisons by Holm's step-down method."""
    known = sorted((name for name, p in p_values.items() if np.isfinite(p)), key=p_values.get)
    times = [(len(known) - rank) * p_values[name] for rank, name in enumerate(known)]
    return dict(zip(known, np.maximum.accumulate(times).clip(max=1), strict=True))


# ------------------------------------------------------------------------------------ what is shown


def by_setting(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """The finished runs of each setting that has any, by seed, with BASE last."""
    runs = {name: {} for name in sorted(SETTINGS, key=BASE.__eq__)}
    for row in rows:
        if "failed" not in row:
            runs[row["setting"]][row["seed"]] = row
    return {name: of for name, of in runs.items() if of}


def differences(own: dict[int, dict], base: dict[int, dict], measure: str) -> np.ndarray:
    """A measure of one setting minus that of another, for every seed that has both."""
    return np.array([own[k][measure] - base[k][measure] for k in sorted(own.keys() & base.keys())])


def mean(runs: dict[int, dict], measure: str) -> float | np.ndarray:
    return np.mean([row[measure] for row in runs.values()], axis=0)


def compare(rows: list[dict]) -> list[dict]:
    """A line per setting: mean area and final accuracy over its seeds, and differences from BASE
    over the seeds that both have, with 95 % confidence intervals. p is for the area, Holm-adjusted
    for all settings; the intervals are not adjusted."""
    lines, runs = [], by_setting(rows)
    less = {n: {m: paired(differences(runs[n], runs[BASE], m)) for m in CURVE} for n in runs}
    adjusted = holm({name: of["area"][2] for name, of in less.items() if name != BASE})
    for name, of in runs.items():
        lines.append({"setting": name, "seeds": len(of.keys() & runs[BASE].keys())})
        for measure in CURVE:
            lines[-1][measure] = f"{mean(of, measure):.3f}"
            if name != BASE:
                change, half, _ = less[name][measure]
                lines[-1][f"{measure} less {BASE}"] = f"{change:+.3f} ± {half:.3f}"
            if measure == "area" and name in adjusted:
                lines[-1]["p"] = f"{adjusted[name]:.3f}"
    return lines


def describe(rows: list[dict]) -> list[dict]:
    """A line per setting: means over its seeds of the other measures."""
    return [
        {"setting": name} | {title: f"{mean(of, m):.{d}f}" for title, (m, d) in DESCRIBED.items()}
        for name, of in by_setting(rows).items()
    ]


def draw(rows: list[dict], path: Path) -> None:
    """Draws learning curves and the primary outcome's differences from BASE, as a PNG."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    runs = by_setting(rows)
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, (name, of) in enumerate(runs.items()):
        curve, colour = mean(of, "curve"), "black" if name == BASE else f"C{k}"
        left.plot((np.arange(len(curve)) + 0.5) / len(curve), curve, label=name, color=colour)
        if name != BASE:
            change, half, _ = paired(differences(of, runs[BASE], "area"))
            right.errorbar(change, name, xerr=half, fmt="o", capsize=3, color=colour)
    left.set(xlabel="share of training", title="soft accuracy of the training samples")
    left.legend()
    right.axvline(0, color="0.6")
    right.invert_yaxis()
    right.set(title=f"area less that of {BASE}, 95 % confidence interval")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--max_steps", type=int, default=events.DEFAULTS["max_steps"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    work = Path(f"runs/ablations-{provenance()['commit']}")  # another commit's models may differ
    parser.add_argument("--work_dir", type=Path, default=work)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    torch.set_num_threads(1)  # as in the runs, for the record
    results = Results(args.work_dir / "ablations.json")
    asked = dict.fromkeys(product(args.seeds, args.settings))
    keys = [dict(setting=name, seed=k, max_steps=args.max_steps) for k, name in asked]
    with one_sentence("interrupted; rerun the command to make what is missing"):
        make_all(args.work_dir, keys, results, args.jobs)
    rows = [row for row in results.rows if row["max_steps"] == args.max_steps]
    if BASE not in by_setting(rows):
        raise SystemExit(f"no run of {BASE} to compare with; add it to --settings")
    print(table(compare(rows)), table(describe(rows)), sep="\n\n")
    draw(rows, args.work_dir / "ablations.png")
    raise SystemExit(int(any("failed" in row for row in rows)))


if __name__ == "__main__":
    main()
