"""The curves of runs, and the data of the page of token weights. The page itself is looked at in
test_page.py."""

import json
import math
import sys

import numpy as np
import pytest
from page_cases import CONFIG, group_row, words, write_lines, write_run
from PIL import Image

from tools import curves, weights_page

GARBAGE = ["not json\n", "[1]\n", '{"reward": 1}\n', "[" * 10**5 + "\n"]
GROUP = group_row(1, [words("x", 3)])


def metric_row(step: int, **other) -> dict:
    return dict(step=step, **dict.fromkeys(curves.PANELS, step / 9)) | other


def test_smoothing_by_hand():
    """Window 3: the ends have two values, and the hole leaves one out."""
    values = np.array([1.0, 3.0, math.nan, 5.0, 9.0])
    assert curves.smooth(values, 3).tolist() == [2.0, 2.0, 4.0, 7.0, 7.0]
    assert np.isnan(curves.smooth(np.full(3, math.nan), 1)).all()


@pytest.mark.slow
def test_curves_draw_what_there_is_and_count_what_is_left_out(tmp_path, capsys):
    logs = {
        "one line": ([metric_row(1)], 1),
        "cut off": ([metric_row(1), metric_row(2), json.dumps(metric_row(3))[:99]], 2),
        "$\\NaN$ _": ([metric_row(k, loss=[math.nan, math.inf, None][k]) for k in range(3)], 3),
        "few metrics": ([dict(step=k, loss=k) for k in range(9)], 9),
        "garbage between": ([*GARBAGE, metric_row(1), *GARBAGE, metric_row(2)], 2),
    }
    runs = [tmp_path / name for name in logs]
    for run, (lines, rows) in zip(runs, logs.values(), strict=True):
        write_lines(run / "metrics.jsonl", lines)
        assert len(curves.read_metrics(run)) == rows
    note = f"note: {tmp_path}/garbage between/metrics.jsonl: 8 malformed line(s)"
    assert capsys.readouterr().err == f"{note} left out\n"
    curves.draw(runs, tmp_path / "c.png")
    pixels = Image.open(tmp_path / "c.png").convert("RGB").getcolors(1 << 24)
    shown = {"#{:02X}{:02X}{:02X}".format(*colour) for count, colour in pixels if count > 20}
    assert shown.intersection(curves.COLOURS) == set(curves.COLOURS[: len(runs)])
    curves.draw(runs[:1], tmp_path / "c.svg")
    assert str(runs[0]) in (tmp_path / "c.svg").read_text()


@pytest.mark.slow
def test_every_clip_is_stored_once_and_a_bad_one_is_named_in_its_place(tmp_path, capsys):
    """Lines that are no groups are left out and counted."""
    import toy

    frames = toy.draw_clip(["red"], np.random.default_rng(0))
    toy.write_mp4(tmp_path / "a.mp4", frames, toy.RATE)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    good, gone, broken = (str(tmp_path / name) for name in ("a.mp4", "gone.mp4", "broken.mp4"))
    rows = [GROUP | dict(video=name) for name in (good, gone, good, broken)]
    run = write_run(tmp_path / "run", [*GARBAGE, *rows, json.dumps(GROUP)[:80]])
    data = weights_page.page_data(run, 200)
    assert data["groups"] == rows and data["total"] == 8
    assert "completions.jsonl: 4 malformed line(s)" in capsys.readouterr().err
    clips = data["clips"]
    assert len(clips) == 3 and len(clips[good]["frames"]) == 4
    why = f"clip cannot be shown: {gone}: no such video file, or an empty one"
    assert clips[gone]["error"] == why
    assert clips[broken]["error"].startswith(f"clip cannot be shown: {broken}")
    # As large as the model saw them: in units of 28 pixels, or 32 where a checkpoint says so.
    assert clips[good]["width"] == clips[good]["height"] == 56
    vision = dict(patch_size=16, spatial_merge_size=2)
    write_lines(run / "checkpoint-9" / "config.json", [dict(vision_config=vision)])
    assert weights_page.page_data(run, 200)["clips"][good]["width"] == 32


def test_any_failure_of_a_clip_is_told_in_its_place():
    """A picture must not end a finished training with a traceback."""

    def no_memory(*_):
        raise MemoryError

    clip = weights_page.shown_clip("a.mp4", [], no_memory)
    assert clip == dict(error="clip cannot be shown: MemoryError")


@pytest.mark.parametrize(
    "tool, out, config, lines, error",
    [
        (curves, "c.png", CONFIG, None, "metrics.jsonl cannot be read (No such file"),
        (curves, "c.png", CONFIG, GARBAGE, "metrics.jsonl holds nothing to show yet"),
        (curves, "c.xyz", CONFIG, [metric_row(1)], "c.xyz must end in one of .png"),
        (curves, "no/such.png", CONFIG, [metric_row(1)], "no/such.png"),
        (weights_page, "w.html", "[", [GROUP], "config.json cannot be read"),
        (weights_page, "w.html", CONFIG, None, "completions.jsonl cannot be read"),
        (weights_page, "w.html", CONFIG, GARBAGE, "completions.jsonl holds nothing to show yet"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    tool, out, config, lines, error, tmp_path, monkeypatch
):
    run = write_lines(tmp_path / "run" / "config.json", [config])
    if lines:
        name = "metrics" if tool is curves else "completions"
        write_lines(run / f"{name}.jsonl", lines)
    monkeypatch.setattr(sys, "argv", ["tool", str(run), "-o", str(tmp_path / out)])
    with pytest.raises(SystemExit) as end:
        tool.main()
    told = str(end.value)
    assert told.startswith("error: ") and error in told and "\n" not in told
    assert not (tmp_path / out).exists()
