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
from tools.weights_page import (
    json_lines,
    json_object,
    note_left_out,
    number,
    output,
    positive,
    write_page,
)

PANELS = {
    "reward": "reward (mean)",
    "reward_std": "reward std within a group",
    "rewards/accuracy": "accuracy reward (mean)",
    "completion_length": "completion length (tokens)",
    "loss": "loss",
    "weight_std": "spread of the weights (std of w_t)",
}
PHASES = {f"time/{name}": f"{name} (s/step)" for name in ("data", "rollout", "score", "update")}
# The Okabe-Ito palette, told apart by colour-blind readers too. 7 colours and 4 line styles have no
# common factor, so stepping through both gives 28 different lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")

GROUPS_AT_THE_END = 20  # of the page a run writes of itself: a clip costs about 0.2 s


def read_metrics(run: Path) -> list[dict]:
    """The lines of run/metrics.jsonl, in order. Raises UserError if there are none."""
    path = run / "metrics.jsonl"
    lines = json_lines(path)
    rows = [row for row in map(json_object, lines) if row and "step" in row]
    rows = [row for row in rows if math.isfinite(number(row["step"]))]
    note_left_out(path, len(lines) - len(rows))
    if not rows:
        raise UserError(f"{path} holds no line with a step yet; draw it after the first step")
    return rows


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean of what there is: near the ends of fewer values, and without the NaNs."""
    known, kernel = np.isfinite(values), np.ones(window)
    total = np.convolve(np.where(known, values, 0.0), kernel, "same")
    count = np.convolve(known, kernel, "same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def distinct_names(runs: list[Path]) -> list[str]:
    """The name of each directory, led by as many parents as tell it from the others."""
    names, all_parts = [], [run.resolve().parts for run in runs]
    for parts in all_parts:
        depth = 1
        while depth < len(parts) and sum(p[-depth:] == parts[-depth:] for p in all_parts) > 1:
            depth += 1
        name = str(Path(*parts[-depth:])).encode(errors="replace").decode()
        name = textwrap.fill(name, 100)
        names.append(name.replace("$", r"\$"))  # or matplotlib reads $...$ as a formula
    return names


def draw(runs: list[Path], out: Path) -> None:
    """One panel per metric, one colour and line style per run: faint as measured, bold smoothed.
    Writes a picture in the format of out's suffix. Raises UserError."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    runs = list({run.resolve(): run for run in runs}.values())  # one named twice is one run
    metrics, names = [read_metrics(run) for run in runs], distinct_names(runs)
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    if (out.suffix or ".png")[1:] not in figure.canvas.get_supported_filetypes():
        raise UserError(f"-o {out} has an unknown ending; use .png, .svg or .pdf")
    top, middle = list(PANELS)[:3], list(PANELS)[3:]
    columns = [np.repeat(top, 4), np.repeat(middle, 4), np.repeat(list(PHASES), 3)]
    axes = figure.subplot_mosaic([list(row) for row in columns])
    for axis in (axes[name] for name in list(PHASES)[1:]):
        axis.sharey(axes["time/data"])  # so that the eye sees which phase takes the time
    handles = []
    for k, rows in enumerate(metrics):
        colour, style = COLOURS[k % len(COLOURS)], STYLES[k % len(STYLES)]
        steps = np.array([number(row["step"]) for row in rows])
        for name, axis in axes.items():
            values = np.array([number(row.get(name)) for row in rows])
            bold = smooth(values, max(1, len(values) // 20))
            dots = "o" if len(values) < 10 else None  # a single point makes no line
            axis.plot(steps, values, color=colour, alpha=min(0.3, 0.6 / len(runs)), linewidth=0.7)
            (line,) = axis.plot(steps, bold, style, color=colour, marker=dots, markersize=3)
            axis.set_title({**PANELS, **PHASES}[name], fontsize=9)
        handles.append(line)
    for name, axis in axes.items():
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("step", fontsize=8)
        if not any(math.isfinite(number(row.get(name))) for rows in metrics for row in rows):
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", fontsize=8)
    columns = max(1, min(4, 120 // max(map(len, names))))
    lines = "thin: as logged; bold: moving mean over 1/20 of the run"
    figure.supxlabel(lines, x=0.99, ha="right", fontsize=8)
    figure.legend(handles, names, loc="outside upper center", ncols=columns, fontsize=9)
    with output(out) as beside:
        figure.savefig(beside, format=out.suffix[1:] or "png", dpi=150)


def lines_so_far(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def watch(runs: list[Path], out: Path, seconds: float) -> None:
    """Draws again whenever a metrics.jsonl has grown, looking every `seconds`, until Ctrl-C. Runs
    that have written no line yet are waited for. Raises UserError."""
    seen = None
    while True:
        lines = [lines_so_far(run) for run in runs]
        if lines != seen:
            begun = [run for run, count in zip(runs, lines, strict=True) if count]
            if begun:
                draw(begun, out)
            awaited = ", ".join(f"{run}/metrics.jsonl" for run in runs if run not in begun)
            told = f"{len(begun)} run(s) in {out}" + (f"; waiting for {awaited}" if awaited else "")
            print(time.strftime("%H:%M:%S"), told, flush=True)
        seen = lines
        time.sleep(seconds)


# ----------------------------------------------------------------------------------------- commands


def pictures(run: Path) -> list[Path]:
    """The pictures a run draws of itself at its end; a run too short for one goes without it."""
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
    parser.add_argument(
        "--watch", metavar="SECONDS", nargs="?", const=5.0, type=positive(float),
        help="draw again while the runs go on, until Ctrl-C, looking this often (5)",
    )  # fmt: skip
    args = parser.parse_args()
    try:
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
