"""Pictures of a run, from the files it wrote.

python viz.py curves RUN [RUN ...] -o curves.png
"""

import argparse
import json
from pathlib import Path

import numpy as np

LABELS = {
    "reward": "reward (mean)",
    "reward_std": "reward std within a group",
    "rewards/accuracy": "accuracy reward (mean)",
    "completion_length": "completion length (tokens)",
    "loss": "loss",
    "weight_mean": "token weight w_t (mean)",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito palette


def read_metrics(run: Path) -> list[dict]:
    """The lines of run/metrics.jsonl, in order; a line cut off by a kill is left out."""
    rows = []
    for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean; near the ends the mean of what there is."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def curves(runs: list[Path], out: Path) -> None:
    """One panel per metric, one colour per run: faint as measured, bold smoothed. Writes a PNG."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        rows = read_metrics(run)
        for axis, name in zip(axes, LABELS, strict=True):
            points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
            if not points:
                continue
            steps, values = np.array(points, dtype=float).T
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(
                steps, smooth(values, max(1, len(values) // 20)), color=colour, label=Path(run).name
            )
    for axis, name in zip(axes, LABELS, strict=True):
        axis.set_title(LABELS[name], fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = parser.add_subparsers(required=True).add_parser(
        "curves", help="learning curves of one or several runs"
    )
    command.add_argument("runs", nargs="+", type=Path, help="output directories of twgrpo.py")
    command.add_argument("-o", "--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "metrics.jsonl").is_file():
            raise SystemExit(
                f"error: {run}: holds no metrics.jsonl; is it the --output_dir of a run?"
            )
    curves(args.runs, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
