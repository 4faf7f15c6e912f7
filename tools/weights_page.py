"""Writes a page that shows a run's completions, with every token shaded by its weight w_t.

    python -m tools.weights_page RUN -o weights.html

It fills the template weights_page.html with the groups of completions.jsonl and the frames that the
model saw. The page is a single file that loads nothing else. Logs and clips are not trusted: their
text is only ever shown as text.
"""

import argparse
import base64
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from files import UserError, json_lines, one_sentence, read_json, replacing

TEMPLATE = Path(__file__).resolve().parent / "weights_page.html"
FRAME_PIXELS = 168  # the longer side of a frame on the page, at most
FLAGS = "alpha token_weights normalize_token_weights divergence ended_rows loss_type".split()
CLIP_SETTINGS = "fps max_frames min_pixels max_pixels".split()
GROUP = set("step id problem solution video divergence weights completions".split())


def read_log(
    path: Path, columns: Iterable[str], limit: int = sys.maxsize
) -> tuple[list[dict], int]:
    """(rows, count): at most `limit` lines of a run's JSONL file, evenly spaced and including the
    first and last, and the number of lines. Also used by the curves.

    Ignores an incomplete last line, since the run may still be going or was killed. Other lines
    without these columns are left out with a note. Raises UserError if no lines are left.
    """
    remedy = f"is {path.parent} the --output_dir of a run that has finished a step?"
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    chosen = np.linspace(0, len(lines) - 1, min(limit, len(lines))).round().astype(int)
    rows = [row for _, row in json_lines(b"\n".join(lines[k] for k in chosen))]
    rows = [row for row in rows if isinstance(row, dict) and row.keys() >= set(columns)]
    if not rows:
        raise UserError(f"{path} holds nothing to show yet; {remedy}")
    if len(rows) < len(chosen):
        left_out = f"{len(chosen) - len(rows)} malformed line(s) left out"
        print(f"note: {path}: {left_out}", file=sys.stderr)
    return rows, len(lines)


def frame_factor(run: Path, model: str) -> int:
    """The pixel multiple of a frame's sides (32 for Qwen3-VL), read from a checkpoint of the run or
    the model's directory."""
    for path in (*run.glob("checkpoint-*/config.json"), Path(model) / "config.json"):
        if path.exists():
            vision = read_json(path, "choose another run").get("vision_config", {})
            return vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)
    return 28  # of Qwen2-VL and Qwen2.5-VL


def shown_clip(path: str, settings: tuple, load_clip: Callable) -> dict:
    """The frames that the model saw, as small base64 JPEGs, or a sentence that says why there are
    none."""
    from PIL import Image

    frames = []
    try:
        clip = load_clip(path, *settings)
        for frame_3HW in clip.frames:
            image, jpeg = Image.fromarray(frame_3HW.permute(1, 2, 0).numpy()), io.BytesIO()
            image.thumbnail((FRAME_PIXELS, FRAME_PIXELS))
            image.save(jpeg, "JPEG", quality=85)
            frames.append(base64.b64encode(jpeg.getvalue()).decode())
    except Exception as error:  # say, out of memory: a picture must not fail a finished run
        return dict(error=f"clip cannot be shown: {str(error) or type(error).__name__}")
    height, width = clip.frames.shape[-2:]
    return dict(frames=frames, seconds=clip.seconds, width=width, height=height)


def page_data(run: Path, max_groups: int) -> dict:
    """The page's data: at most `max_groups` groups, evenly spaced over the run, and each clip once.
    Raises UserError if there are no groups."""
    from run.decoder import ClipReader  # imports torch, which the curves do not need
    from video import ClipSettings

    config = read_json(run / "config.json", f"is {run} the --output_dir of a run?")
    groups, total = read_log(run / "completions.jsonl", GROUP, max_groups)
    settings = ClipSettings(*(config.get(name) for name in CLIP_SETTINGS))
    shown = (settings, frame_factor(run, str(config.get("model_name_or_path"))))
    names = dict.fromkeys(str(group["video"]) for group in groups)
    with ClipReader() as reader:
        clips = {name: shown_clip(name, shown, reader.load_clip) for name in names}
    flags = {name: config[name] for name in FLAGS if name in config}
    return dict(run=run.resolve().name, total=total, flags=flags, groups=groups, clips=clips)


def write_page(run: Path, out: Path, max_groups: int) -> None:
    """Writes the page, a self-contained file. Raises UserError or OSError."""
    before, after = TEMPLATE.read_text(encoding="utf-8").split("<!-- DATA -->")
    # No text can end the block or start another: "<" and everything beyond ASCII are escaped.
    data = json.dumps(page_data(run, max_groups)).replace("<", "\\u003c")
    block = f'<script type="application/json" id="data">{data}</script>'
    with replacing(out) as beside:
        beside.write_text(before + block + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="an --output_dir")
    parser.add_argument("-o", "--out", type=Path, default=Path("weights.html"))
    help = "show at most this many groups, evenly spaced over the run (200)"
    parser.add_argument("--max_groups", metavar="N", type=int, default=200, help=help)
    args = parser.parse_args()
    if args.max_groups < 1:
        parser.error("--max_groups must be at least 1")
    with one_sentence():
        write_page(args.run, args.out, args.max_groups)
    print(args.out)


if __name__ == "__main__":
    main()
