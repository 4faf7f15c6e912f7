"""Plots learning curves of one or more runs, from their metrics.jsonl.

    python -m tools.curves RUN [RUN ...] -o curves.png

A RUN is an --output_dir of twgrpo.py. At its end, every run plots its own curves and writes its
page of token weights.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from files import UserError, one_sentence, replacing
from tools.weights_page import read_log, write_page

PANELS = {
    "reward": "reward (mean)",
    "reward_std": "reward std within a group",
    "rewards/accuracy": "accuracy reward (mean)",
    "completion_length": "completion length (tokens)",
    "loss": "loss",
    "weight_std": "spread of the weights (std of w_t)",
    **{f"time/{name}": f"{name} (s/step)" for name in ("data", "rollout", "score", "update")},
}
FORMATS = (".png", ".svg", ".pdf")
# The Okabe-Ito palette, safe for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
GROUPS_AT_THE_END = 20  # on the page written at the end of a run; each clip takes about 0.2 s


def read_metrics(run: Path) -> list[dict]:
    """The lines of run/metrics.jsonl, in order. Raises UserError if there are none."""
    return read_log(run / "metrics.jsonl", ["step"])[0]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean over the finite values; shorter near the ends."""
    known, kernel = np.isfinite(values), np.ones(window)
    total = np.convolve(np.where(known, values, 0.0), kernel, "same")
    count = np.convolve(known, kernel, "same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def draw(runs: list[Path], out: Path) -> None:
    """One panel per metric, one colour per run: thin as logged, bold smoothed. The suffix of `out`
    sets the format. Raises UserError or OSError."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    if out.suffix not in FORMATS:
        raise UserError(f"{out} must end in one of {', '.join(FORMATS)}")
    metrics = [read_metrics(run) for run in runs]
    figure = Figure(figsize=(15, 6), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(2, 5).flat, PANELS.items(), strict=True):
        lines = draw_panel(axis, name, metrics)
        axis.set_title(title, fontsize=9)
    note = "thin: as logged; bold: moving mean over 1/20 of the run"
    figure.supxlabel(note, x=0.99, ha="right", fontsize=8)
    names = [str(run).replace("$", r"\$") for run in runs]  # $...$ would be a formula
    columns = max(1, min(4, 120 // max(map(len, names))))
    figure.legend(lines, names, loc="outside upper center", ncols=columns, fontsize=9)
    with replacing(out) as beside:
        figure.savefig(beside, format=out.suffix[1:], dpi=150)


def draw_panel(axis, name: str, metrics: list[list[dict]]) -> list:
    """Draws one metric of every run; returns the bold lines, for the legend."""
    lines = []
    for k, rows in enumerate(metrics):
        colour = COLOURS[k % len(COLOURS)]
        steps = [row["step"] for row in rows]
        values = np.array([row.get(name) for row in rows], dtype=float)  # NaN where missing
        bold = smooth(values, max(1, len(values) // 20))
        dots = "o" if len(values) < 10 else None  # a single point makes no line
        axis.plot(steps, values, color=colour, alpha=min(0.3, 0.6 / len(metrics)), linewidth=0.7)
        lines += axis.plot(steps, bold, color=colour, marker=dots, markersize=3)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
    axis.set_xlabel("step", fontsize=8)
    return lines


def pictures(run: Path) -> list[Path]:
    """Draws the plots at the end of a run; if it is too short for one, that one is omitted."""
    drawn = []
    for name, make in (
        ("curves.png", lambda out: draw([run], out)),
        ("weights.html", lambda out: write_page(run, out, GROUPS_AT_THE_END)),
    ):
        try:
            make(run / name)
            drawn.append(run / name)
        except (UserError, OSError) as error:
            print(f"note: {error}", file=sys.stderr)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="an --output_dir")
    parser.add_argument("-o", "--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    with one_sentence():
        draw(args.runs, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
