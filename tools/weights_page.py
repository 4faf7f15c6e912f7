"""A page that shows the completions of a run, every token shaded by its weight w_t.

    python -m tools.weights_page RUN -o weights.html

It puts the groups of completions.jsonl, and the frames the model was shown, into the template
weights_page.html. The page is one file that loads nothing else.

The logs and clips may come from anyone: their text is only ever shown as text, and a line that
does not hold a group is left out and counted.
"""

import argparse
import base64
import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from itertools import starmap
from pathlib import Path

import numpy as np

from files import UserError, json_lines, read_json, replacing

TEMPLATE = Path(__file__).resolve().parent / "weights_page.html"
FRAME_PIXELS = 168  # the longer side of a frame on the page, at most
FLAGS = ("token_weights", "normalize_token_weights", "divergence", "ended_rows", "loss_type")
CLIP_SETTINGS = ("fps", "max_frames", "min_pixels", "max_pixels")


# -------------------------------------------------------------------- also used by the curves


def read_log(
    path: Path, keep: Callable[[dict], dict | None], limit: int = sys.maxsize
) -> tuple[list[dict], int]:
    """(rows, count): `keep` applied to at most `limit` lines of a run's JSONL file, evenly spaced
    and including the first and the last, and the number of lines.

    Ignores a last line that was cut off, by a kill or because the run goes on. Other lines that are
    not JSON objects, and lines for which `keep` returns None, are left out with a note. Raises
    UserError if the file cannot be read.
    """
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {reason}; is {path.parent} the --output_dir of a run?") from None
    lines = [line for line in lines if line.strip()]
    if parsed(last) is not None:
        lines.append(last)
    chosen = np.linspace(0, len(lines) - 1, min(limit, len(lines))).round().astype(int)
    rows = [row for row in (keep(parsed(lines[k]) or {}) for k in chosen) if row]
    if len(rows) < len(chosen):
        left_out = f"{len(chosen) - len(rows)} line(s) that make no sense are left out"
        print(f"note: {path}: {left_out}", file=sys.stderr)
    return rows, len(lines)


def parsed(line: bytes) -> dict | None:
    _, value = next(json_lines(line), (0, None))
    return value if isinstance(value, dict) else None


def number(value) -> float:
    """A measurement, within float32; NaN for everything else, such as null, true and text."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 3e38 else math.nan


@contextlib.contextmanager
def output(path: Path) -> Iterator[Path]:
    """A path to write a picture to, which then replaces `path`. Raises UserError if `path` cannot
    be written, or is something that must not be replaced, such as a device."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a file that can be replaced; choose another -o")
    try:
        with replacing(path) as beside:
            yield beside
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written ({reason}); name another file with -o") from None


# ----------------------------------------------------------------------------------------- the page


def read_config(run: Path) -> dict:
    """The flags of a run. Raises UserError unless those that the page needs are usable."""
    config = read_json(run / "config.json", f"is {run} the --output_dir of a run?")
    for name in ("alpha", *CLIP_SETTINGS):
        if not number(config.get(name)) > 0:
            raise UserError(f"{run}/config.json has no number above 0 for {name}")
    return config


def shown_group(row: dict) -> dict | None:
    """What the page needs of a line of completions.jsonl; None if something is missing, or there is
    not one weight for each position and one log-prob for each token."""
    try:
        group = dict(
            step=shown_number(row["step"]),
            **{name: str(row[name]) for name in ("id", "problem", "solution", "video")},
            divergence=[shown_number(d) for d in row["divergence"]],
            weights=[shown_number(w) for w in row["weights"]],
            completions=[
                dict(
                    tokens=[str(token) for token in c["tokens"]],
                    logps=[shown_number(logp) for logp in c["logps"]],
                    advantage=shown_number(c["advantage"]),
                    rewards={name: shown_number(r) for name, r in c["rewards"].items()},
                )
                for c in row["completions"]
            ],
        )
    except (KeyError, TypeError, AttributeError, RecursionError):
        return None
    T = max((len(c["tokens"]) for c in group["completions"]), default=0)
    per_position = all(len(group[name]) == T > 0 for name in ("divergence", "weights"))
    per_token = all(len(c["logps"]) == len(c["tokens"]) for c in group["completions"])
    return group if per_position and per_token else None


def shown_number(value) -> float | None:
    """JSON has no NaN: the page is told null, and says so."""
    return None if math.isnan(number(value)) else value


def shown_clip(path: str, config: dict, load_clip: Callable) -> dict:
    """The frames that the model was shown, as small JPEGs in base64; or a sentence that says why
    there are none."""
    from PIL import Image

    if not os.path.exists(path):
        where = "relative paths start from the directory the run was started in"
        return dict(error=f"clip not found: {path} ({where})")
    frames = []
    try:
        clip = load_clip(path, *(config[name] for name in CLIP_SETTINGS))
        for frame_3HW in clip.frames:
            image, jpeg = Image.fromarray(frame_3HW.permute(1, 2, 0).numpy()), io.BytesIO()
            image.thumbnail((FRAME_PIXELS, FRAME_PIXELS))
            image.save(jpeg, "JPEG", quality=85)
            frames.append(base64.b64encode(jpeg.getvalue()).decode())
    except Exception as error:  # say, no memory: a picture must not fail a run that is done
        reason = str(error) or type(error).__name__
        return dict(error=f"clip cannot be shown: {reason}")
    height, width = clip.frames.shape[-2:]
    return dict(frames=frames, seconds=clip.seconds, width=width, height=height)


def data_block(name: str, value) -> str:
    """JSON that the page's script finds by its name. No text in it can end the block or begin
    another one: `<` is escaped here, and everything beyond ASCII by json.dumps."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def page_data(run: Path, max_groups: int) -> Iterator[tuple[str, object]]:
    """The data blocks of the page: at most `max_groups` groups, evenly spaced over the run; every
    clip once; and what all have in common. Raises UserError."""
    from run.decoder import ClipReader  # imports torch, which the curves do not need

    config = read_config(run)
    groups, total = read_log(run / "completions.jsonl", shown_group, max_groups)
    if not groups:
        path = run / "completions.jsonl"
        raise UserError(f"{path} holds no group yet; a run writes one every --logging_steps")
    for k, group in enumerate(groups):
        yield f"group-{k}", group
    clips = {group["video"]: 0 for group in groups}
    with ClipReader() as reader:
        for k, name in enumerate(clips):
            clips[name] = k
            yield f"clip-{k}", shown_clip(name, config, reader.load_clip)
    index = [[group["step"], group["id"], clips[group["video"]]] for group in groups]
    flags = {name: str(config[name]) for name in FLAGS if name in config}
    flags = dict(alpha=config["alpha"], **flags)
    yield "about", dict(run=run.resolve().name, total=total, groups=index, flags=flags)


def write_page(run: Path, out: Path, max_groups: int) -> None:
    """Writes the page, one file that needs nothing else. Raises UserError."""
    before, after = TEMPLATE.read_text(encoding="utf-8").split("<!-- DATA -->")
    with output(out) as beside, open(beside, "w", encoding="utf-8", newline="\n") as page:
        page.write(before)
        page.writelines(starmap(data_block, page_data(run, max_groups)))
        page.write(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="an --output_dir")
    parser.add_argument("-o", "--out", type=Path, default=Path("weights.html"))
    help = "show at most this many groups, evenly spaced over the run (200)"
    parser.add_argument("--max_groups", metavar="N", type=int, default=200, help=help)
    args = parser.parse_args()
    if args.max_groups < 1:
        parser.error("--max_groups must be at least 1")
    try:
        write_page(args.run, args.out, args.max_groups)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(args.out)


if __name__ == "__main__":
    main()
