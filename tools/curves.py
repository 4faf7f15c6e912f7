"""Learning curves of one or several runs, from their metrics.jsonl.

    python -m tools.curves RUN [RUN ...] -o curves.png

A RUN is an --output_dir of twgrpo.py. A run draws its own curves, and its page of token weights,
when it ends.
"""

import argparse
import math
import sys
import textwrap
import time
from pathlib import Path

import numpy as np

from files import UserError
from tools.weights_page import number, output, read_log, write_page

PANELS = {
    "reward": "reward (mean)",
    "reward_std": "reward std within a group",
    "rewards/accuracy": "accuracy reward (mean)",
    "completion_length": "completion length (tokens)",
    "loss": "loss",
    "weight_std": "spread of the weights (std of w_t)",
}
PHASES = {f"time/{name}": f"{name} (s/step)" for name in ("data", "rollout", "score", "update")}
# The Okabe-Ito palette, which colour-blind readers can tell apart. 7 colours and 4 line styles have
# no common factor, so stepping through both gives 28 different lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
GROUPS_AT_THE_END = 20  # on the page a run writes by itself: decoding a clip takes about 0.2 s


def read_metrics(run: Path) -> list[dict]:
    """The lines of run/metrics.jsonl, in order. Raises UserError if there are none."""
    path = run / "metrics.jsonl"
    rows, _ = read_log(path, lambda row: row if math.isfinite(number(row.get("step"))) else None)
    if not rows:
        raise UserError(f"{path} holds no line with a step yet; draw it after the first step")
    return rows


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean over the finite values; shorter near the ends."""
    known, kernel = np.isfinite(values), np.ones(window)
    total = np.convolve(np.where(known, values, 0.0), kernel, "same")
    count = np.convolve(known, kernel, "same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def draw(runs: list[Path], out: Path) -> None:
    """One panel per metric, one colour and line style per run: faint as measured, bold smoothed.
    The suffix of `out` is the format. Raises UserError."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    runs = list({run.resolve(): run for run in runs}.values())  # one named twice is one run
    metrics = [read_metrics(run) for run in runs]
    names = [str(run).encode(errors="replace").decode().replace("$", r"\$") for run in runs]
    names = [textwrap.fill(name, 100) for name in names]  # \$, because $...$ would be a formula
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    if (out.suffix or ".png")[1:] not in figure.canvas.get_supported_filetypes():
        raise UserError(f"-o {out} has an unknown ending; use .png, .svg or .pdf")
    top, middle = list(PANELS)[:3], list(PANELS)[3:]
    columns = [np.repeat(top, 4), np.repeat(middle, 4), np.repeat(list(PHASES), 3)]
    axes = figure.subplot_mosaic([list(row) for row in columns])
    for axis in (axes[name] for name in list(PHASES)[1:]):
        axis.sharey(axes["time/data"])  # so that the eye sees which phase takes the time
    for name, axis in axes.items():
        lines = draw_panel(axis, name, metrics)
        axis.set_title({**PANELS, **PHASES}[name], fontsize=9)
    columns = max(1, min(4, 120 // max(map(len, names))))
    note = "thin: as logged; bold: moving mean over 1/20 of the run"
    figure.supxlabel(note, x=0.99, ha="right", fontsize=8)
    figure.legend(lines, names, loc="outside upper center", ncols=columns, fontsize=9)
    with output(out) as beside:
        figure.savefig(beside, format=out.suffix[1:] or "png", dpi=150)


def draw_panel(axis, name: str, metrics: list[list[dict]]) -> list:
    """Draws one metric of every run; returns the bold lines, for the legend."""
    lines = []
    for k, rows in enumerate(metrics):
        colour, style = COLOURS[k % len(COLOURS)], STYLES[k % len(STYLES)]
        steps = np.array([number(row["step"]) for row in rows])
        values = np.array([number(row.get(name)) for row in rows])
        bold = smooth(values, max(1, len(values) // 20))
        dots = "o" if len(values) < 10 else None  # a single point makes no line
        axis.plot(steps, values, color=colour, alpha=min(0.3, 0.6 / len(metrics)), linewidth=0.7)
        lines += axis.plot(steps, bold, style, color=colour, marker=dots, markersize=3)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
    axis.set_xlabel("step", fontsize=8)
    if not any(np.isfinite(line.get_ydata()).any() for line in lines):
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", fontsize=8)
    return lines


def watch(runs: list[Path], out: Path, seconds: float) -> None:
    """Draws again whenever a metrics.jsonl has grown, looking every `seconds`, until Ctrl-C. Waits
    for runs that have written nothing yet. Raises UserError."""
    seen: dict[Path, int] | None = None
    while True:
        logs = {run: run / "metrics.jsonl" for run in runs}
        lines = {run: log.read_bytes().count(b"\n") for run, log in logs.items() if log.exists()}
        if lines != seen:
            if begun := [run for run, count in lines.items() if count]:
                draw(begun, out)
            print(f"{time.strftime('%H:%M:%S')} {len(begun)} of {len(runs)} run(s)", flush=True)
        seen = lines
        time.sleep(seconds)


def pictures(run: Path) -> list[Path]:
    """Draws the pictures of a run that ends; a run too short for one of them goes without it."""
    drawn = []
    for name, make in (
        ("curves.png", lambda out: draw([run], out)),
        ("weights.html", lambda out: write_page(run, out, GROUPS_AT_THE_END)),
    ):
        try:
            make(run / name)
            drawn.append(run / name)
        except UserError as error:
            print(f"note: {error}", file=sys.stderr)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="an --output_dir")
    parser.add_argument("-o", "--out", type=Path, default=Path("curves.png"))
    help = "draw again whenever a run has grown, until Ctrl-C, looking this often (5)"
    parser.add_argument("--watch", metavar="SECONDS", nargs="?", const=5.0, type=float, help=help)
    args = parser.parse_args()
    try:
        if args.watch is not None and not 0 < args.watch < math.inf:
            parser.error("--watch must be above 0")
        if args.watch:
            watch(args.runs, args.out, args.watch)
        draw(args.runs, args.out)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(0 if args.watch else 130) from None
    print(args.out)


if __name__ == "__main__":
    main()
