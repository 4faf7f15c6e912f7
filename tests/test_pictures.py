"""The curves of runs, and the data of the page of token weights. The page itself is looked at in
test_page.py."""

import json
import math
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from page_cases import CONFIG, group_row, run_tool, words, write_lines, write_run
from PIL import Image

from files import UserError
from tools import curves, weights_page

GARBAGE = ["not json\n", "[1]\n", "\n", '{"reward": 1}\n', '{"step": "x"}\n', "[" * 10**5 + "\n"]


def metric_row(step: int, **other) -> dict:
    names = [*curves.PANELS, "learning_rate"]
    return dict(step=step, **{name: random.random() for name in names}) | other


def write_metrics(run: Path, lines: list) -> Path:
    return write_lines(run / "metrics.jsonl", lines)


def has_colour(png: Path, colour: str) -> bool:
    """Does the picture have more than a few pixels of this colour?"""
    wanted = tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5))
    counts = Image.open(png).convert("RGB").getcolors(1 << 24)
    return any(count > 20 and found == wanted for count, found in counts)


# ------------------------------------------------------------------------------------------- curves


def test_smoothing_by_hand():
    """Window 3: the ends have two values, and the hole leaves one out."""
    values = np.array([1.0, 3.0, math.nan, 5.0, 9.0])
    assert curves.smooth(values, 3).tolist() == [2.0, 2.0, 4.0, 7.0, 7.0]
    assert np.isnan(curves.smooth(np.full(3, math.nan), 1)).all()


@pytest.mark.slow
def test_several_runs_are_drawn_over_each_other(tmp_path):
    """Three runs of 2,000 steps, in less than 5 s of processor time."""
    runs = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "$\\x$ _"]
    for run in runs:
        write_metrics(run, [metric_row(k) for k in range(1, 2001)])
    start = time.process_time()
    curves.draw(runs, tmp_path / "c.png")
    assert time.process_time() - start < 5
    assert all(has_colour(tmp_path / "c.png", colour) for colour in curves.COLOURS[:3])
    assert not has_colour(tmp_path / "c.png", curves.COLOURS[3])
    curves.draw(runs[:1], tmp_path / "c.svg")
    picture = (tmp_path / "c.svg").read_text()
    assert "bold: moving mean over 1/20 of the run" in picture and str(runs[0]) in picture


@pytest.mark.slow
def test_curves_draw_what_there_is_and_count_what_is_left_out(tmp_path, capsys):
    huge = [math.nan, math.inf, 10**400]
    logs = {
        "one line": ([metric_row(1)], 1, 0),
        "cut off": ([metric_row(1), metric_row(2), json.dumps(metric_row(3))[:99]], 2, 0),
        "NaN and huge": ([metric_row(k, loss=huge[k]) for k in range(3)], 3, 0),
        "text for numbers": ([metric_row(k, loss="x", reward=None) for k in range(3)], 3, 0),
        "few metrics": ([dict(step=k, loss=k) for k in range(9)], 9, 0),
        "garbage between": ([*GARBAGE, metric_row(1), *GARBAGE, metric_row(2)], 2, 12),
        "one more": ([metric_row(1)], 1, 0),
    }
    for name, (lines, rows, left_out) in logs.items():
        run = write_metrics(tmp_path / name, lines)
        assert len(curves.read_metrics(run)) == rows
        note = f"note: {run}/metrics.jsonl: {left_out} line(s)"
        assert capsys.readouterr().err.startswith(note if left_out else "")
    curves.draw([tmp_path / name for name in logs], tmp_path / "c.png")
    assert all(has_colour(tmp_path / "c.png", colour) for colour in curves.COLOURS)


# ---------------------------------------------------------------------------- the data of the page


@pytest.mark.slow
def test_every_clip_is_stored_once_and_a_bad_one_is_named_in_its_place(tmp_path):
    import toy

    frames = toy.draw_clip(["red"], np.random.default_rng(0))
    toy.write_mp4(tmp_path / "a.mp4", frames, toy.RATE)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    good, gone, broken = (str(tmp_path / name) for name in ("a.mp4", "gone.mp4", "broken.mp4"))
    videos = [good, gone, good, broken]
    rows = [group_row(k, [words("x", 3)], video=name) for k, name in enumerate(videos)]
    clips = weights_page.page_data(write_run(tmp_path / "run", rows), 200)["clips"]
    assert len(clips) == 3 and len(clips[good]["frames"]) == 4
    assert clips[gone]["error"] == f"clip cannot be shown: {gone}: no such video file"
    assert clips[broken]["error"].startswith(f"clip cannot be shown: {broken}")


def test_any_failure_of_a_clip_is_told_in_its_place():
    """A picture must not end a finished training with a traceback."""

    def no_memory(*settings):
        raise MemoryError

    clip = weights_page.shown_clip("a.mp4", CONFIG, no_memory)
    assert clip == dict(error="clip cannot be shown: MemoryError")


def test_lines_that_are_no_groups_are_left_out_and_counted(tmp_path, capsys):
    good = group_row(1, [words("x", 3)])
    changes = [
        dict(weights=None),
        dict(completions=[3]),
        dict(completions=[]),
        dict(divergence=5),
        dict(weights=[1.0]),
        dict(completions=[words("x", 2)]),
        dict(completions=[{**words("x", 3), "logps": [-1.0]}]),
    ]
    bad = [{}, *({**good, **change} for change in changes)]
    run = write_run(tmp_path / "run", ["no json\n", *bad, good, json.dumps(good)[:80]])
    data = weights_page.page_data(run, 200)
    assert data["groups"] == [good] and data["total"] == 10
    assert "completions.jsonl: 9 line(s)" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- both


@pytest.mark.slow
def test_what_is_wrong_is_said_in_one_sentence(tmp_path):
    group, metrics = group_row(1, [words("x", 3)]), metric_row(1)

    def run(name: str, groups: list, lines: list) -> Path:
        return write_metrics(write_run(tmp_path / name, groups), lines)

    good, empty = run("good", [group], [metrics]), run("empty", ["nonsense\n"], GARBAGE)
    (run("damaged", [group], []) / "config.json").write_text("[")
    (run("lost", [group], []) / "completions.jsonl").unlink()
    page, draw = weights_page.write_page, curves.draw
    for make, words_ in (
        (
            lambda: draw([tmp_path / "none"], tmp_path / "c.png"),
            "none/metrics.jsonl cannot be read",
        ),
        (
            lambda: draw([empty], tmp_path / "c.png"),
            "empty/metrics.jsonl holds no line with a step",
        ),
        (lambda: draw([good], tmp_path / "c.xyz"), "c.xyz has an unknown ending"),
        (lambda: draw([good], tmp_path / "no/such/c.png"), "no/such/c.png cannot be written"),
        (lambda: page(tmp_path / "none", tmp_path / "w", 9), "none/config.json cannot be read"),
        (lambda: page(tmp_path / "damaged", tmp_path / "w", 9), "config.json cannot be read"),
        (lambda: page(tmp_path / "lost", tmp_path / "w", 9), "completions.jsonl cannot be read"),
        (lambda: page(empty, tmp_path / "w", 9), "completions.jsonl holds no group yet"),
    ):
        with pytest.raises(UserError, match=re.escape(words_)):
            make()
    for tool in ("curves", "weights_page"):
        result = run_tool(tool, tmp_path / "none", "-o", tmp_path / "w")
        assert result.returncode == 1 and re.fullmatch("error: .*\n", result.stderr)
    assert not (tmp_path / "w").exists() and not list(tmp_path.glob(".*.partial"))


def test_only_files_are_replaced(tmp_path, monkeypatch):
    """Not a device such as /dev/null, for which a pipe stands here; a link stays a link."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pointed")
    monkeypatch.chdir(tmp_path)
    for out in (".", "/", "pipe"):
        with pytest.raises(UserError, match="is not a file .*; choose another -o"):
            with weights_page.output(Path(out)):
                pass
    with weights_page.output(Path("link")) as beside:
        beside.write_text("new")
    assert (tmp_path / "pointed").read_text() == "new" and (tmp_path / "link").is_symlink()
    assert (tmp_path / "pipe").is_fifo()
