"""A page that shows the completions of a run, every token shaded by its weight w_t.

    python -m tools.weights_page RUN -o weights.html

It puts the groups of completions.jsonl, and the frames the model was shown, into the template
weights_page.html. The page is one file that loads nothing else.

What is read here may come from anywhere: text is only ever shown as text, and a line that is not
what it should be is left out, and counted.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from itertools import starmap
from pathlib import Path

import numpy as np

from files import UserError, replacing

TEMPLATE = Path(__file__).resolve().parent / "weights_page.html"
FRAME_PIXELS = 168  # the longer side of a frame on the page, at most


def json_lines(path: Path) -> list[bytes]:
    """The lines of a JSONL file, without what a kill, or a run that still goes on, cut off at the
    end. Raises UserError if the file cannot be read."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {reason}; is {path.parent} the --output_dir of a run?") from None
    if json_object(lines[-1]) is None:
        lines.pop()
    return [line for line in lines if line.strip()]


def json_object(text: bytes) -> dict | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return None
    return value if isinstance(value, dict) else None


def note_left_out(path: Path, count: int) -> None:
    if count:
        print(f"note: {path}: {count} line(s) that make no sense are left out", file=sys.stderr)


def number(value) -> float:
    """A measurement; NaN for null, true, text, and what is beyond float32, in which all are
    taken."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 3e38 else math.nan


@contextlib.contextmanager
def output(path: Path):
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


def positive(kind):
    def parse(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse: "invalid positive int value: '0'"
    return parse


# ----------------------------------------------------------------------------------------- the page


def read_config(run: Path) -> dict:
    """The flags of a run. Raises UserError unless those that the page needs are usable."""
    path = run / "config.json"
    try:
        config = json_object(path.read_bytes())
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise UserError(f"{path} {reason}; is {run} the --output_dir of a run?") from None
    for name in ("alpha", "fps", "max_frames", "min_pixels", "max_pixels"):
        if config is None or not number(config.get(name)) > 0:
            raise UserError(f"{path} has no number above 0 for {name}; is it that of a run?")
    return config


def evenly(items: list, count: int) -> list:
    """At most `count` of them, the first and the last included."""
    if len(items) <= count:
        return items
    return [items[k] for k in np.linspace(0, len(items) - 1, count).round().astype(int)]


def shown_group(row: dict | None) -> dict | None:
    """What the page needs of a line of completions.jsonl; None if the line is no group: something
    is missing, or there is not one weight per position and one log-prob per token.

    Runs of before `tokens` was logged show token ids, and the text apart.
    """
    try:
        group = dict(
            step=shown_number(row["step"]),
            **{name: str(row[name]) for name in ("id", "problem", "solution", "video")},
            divergence=[shown_number(d) for d in row["divergence"]],
            weights=[shown_number(w) for w in row["weights"]],
            completions=[
                dict(
                    tokens=[str(token) for token in c.get("tokens", c["token_ids"])],
                    text="" if "tokens" in c else str(c["text"]),
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
    """The frames that the model was shown, as small JPEGs in base64; or in words why not."""
    from PIL import Image

    if not os.path.exists(path):
        return dict(missing=True, error=f"clip not found: {path}")
    settings = [config[name] for name in ("fps", "max_frames", "min_pixels", "max_pixels")]
    frames = []
    try:
        clip = load_clip(path, *settings)
        for frame_3HW in clip.frames:
            image, jpeg = Image.fromarray(frame_3HW.permute(1, 2, 0).numpy()), io.BytesIO()
            image.thumbnail((FRAME_PIXELS, FRAME_PIXELS))
            image.save(jpeg, "JPEG", quality=85)
            frames.append(base64.b64encode(jpeg.getvalue()).decode())
    except Exception as error:  # say, no memory: a picture must not fail a run that is done
        reason = str(error) or type(error).__name__
        return dict(missing=False, error=f"clip cannot be shown: {reason}")
    height, width = clip.frames.shape[-2:]
    return dict(frames=frames, seconds=clip.seconds, width=width, height=height)


def data_block(name: str, value) -> str:
    """JSON that a script finds by its name. No text in it can end the block, or begin another:
    escaped are `<`, and by json.dumps whatever is not ASCII."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def template_halves() -> list[str]:
    """The page before and after its data. Its policy lets run the template's one script and style,
    known by their hashes, and nothing that anybody might smuggle in."""
    page = TEMPLATE.read_text(encoding="utf-8")
    for tag in ("style", "script"):
        source = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        page = page.replace(f"{tag.upper()}_HASH", f"sha256-{digest}")
    return page.split("<!-- DATA -->")


def page_data(run: Path, max_groups: int) -> Iterator[tuple[str, object]]:
    """What the page is told, by the names its script knows: at most `max_groups` groups, evenly
    spaced over the run; every clip once; and what they have in common. Raises UserError."""
    from run.decoder import ClipReader  # here, because it brings torch, and curves should not wait

    config, path = read_config(run), run / "completions.jsonl"
    lines = json_lines(path)
    chosen = evenly(lines, max_groups)
    groups = [g for g in map(shown_group, map(json_object, chosen)) if g]
    note_left_out(path, len(chosen) - len(groups))
    if not groups:
        raise UserError(f"{path} holds no group yet; a run writes one every --logging_steps")
    for k, group in enumerate(groups):
        yield f"group-{k}", group
    clips, missing = {group["video"]: 0 for group in groups}, 0
    with ClipReader() as reader:
        for k, name in enumerate(clips):
            clip = shown_clip(name, config, reader.load_clip)
            clips[name], missing = k, missing + clip.get("missing", 0)
            yield f"clip-{k}", clip
    if missing:
        where = "their paths start from the directory the run was started in"
        print(f"note: {missing} of {len(clips)} clips not found; {where}", file=sys.stderr)
    index = [[group["step"], group["id"], clips[group["video"]]] for group in groups]
    flags = {name: str(config.get(name)) for name in ("divergence", "ended_rows", "loss_type")}
    flags = dict(alpha=config["alpha"], **flags)  # alpha is a number: read_config
    yield "about", dict(run=run.resolve().name, total=len(lines), groups=index, flags=flags)


def write_page(run: Path, out: Path, max_groups: int) -> None:
    """One page that needs nothing else; the browser parses a group only when it is shown. Raises
    UserError."""
    before, after = template_halves()
    with output(out) as beside, open(beside, "w", encoding="utf-8", newline="\n") as page:
        page.write(before)
        page.writelines(starmap(data_block, page_data(run, max_groups)))
        page.write(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="an --output_dir")
    parser.add_argument("-o", "--out", type=Path, default=Path("weights.html"))
    parser.add_argument(
        "--max_groups", metavar="N", type=positive(int), default=200,
        help="show at most this many groups, evenly spaced over the run (200)",
    )  # fmt: skip
    args = parser.parse_args()
    try:
        write_page(args.run, args.out, args.max_groups)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(args.out)


if __name__ == "__main__":
    main()
