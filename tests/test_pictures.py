"""The curves of runs, and the data of the page of token weights. The page itself is looked at in
test_page.py."""

import json
import math
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from page_cases import CONFIG, command, group_row, run_tool, words, write_lines, write_run
from PIL import Image

from files import UserError
from tools import curves, weights_page

GARBAGE = ["not json\n", "[1]\n", "\n", '{"reward": 1}\n', '{"step": "x"}\n', "[" * 10**5 + "\n"]


def metric_row(step: int, **other) -> dict:
    names = [*curves.PANELS, *curves.PHASES, "learning_rate"]
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


def test_several_runs_are_drawn_over_each_other(tmp_path):
    runs = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "$\\x$ _"]
    for run in runs:
        write_metrics(run, [metric_row(k) for k in range(1, 41)])
    curves.draw([*runs, runs[0]], tmp_path / "c.png")
    assert all(has_colour(tmp_path / "c.png", colour) for colour in curves.COLOURS[:3])
    assert not has_colour(tmp_path / "c.png", curves.COLOURS[3])  # named twice, drawn once
    curves.draw(runs[:1], tmp_path / "c.svg")
    picture = (tmp_path / "c.svg").read_text()
    assert "bold: moving mean over 1/20 of the run" in picture and str(runs[0]) in picture


def test_curves_draw_what_there_is_and_count_what_is_left_out(tmp_path, capsys):
    huge = [math.nan, math.inf, 10**400]
    logs = {
        "one line": ([metric_row(1)], 1, 0),
        "one line without its end": ([json.dumps(metric_row(1))], 1, 0),
        "cut off": ([metric_row(1), metric_row(2), json.dumps(metric_row(3))[:99]], 2, 0),
        "NaN and huge": ([metric_row(k, loss=huge[k]) for k in range(3)], 3, 0),
        "text for numbers": ([metric_row(k, loss="x", reward=None) for k in range(3)], 3, 0),
        "few metrics": ([dict(step=k, loss=k) for k in range(9)], 9, 0),
        "garbage between": ([*GARBAGE, metric_row(1), *GARBAGE, metric_row(2)], 2, 10),
    }
    for name, (lines, rows, left_out) in logs.items():
        run = write_metrics(tmp_path / name, lines)
        assert len(curves.read_metrics(run)) == rows
        note = f"note: {run}/metrics.jsonl: {left_out} line(s)"
        assert capsys.readouterr().err.startswith(note if left_out else "")
    curves.draw([tmp_path / name for name in logs], tmp_path / "c.png")
    assert all(has_colour(tmp_path / "c.png", colour) for colour in curves.COLOURS)


def test_curves_say_what_is_wrong(tmp_path):
    good = write_metrics(tmp_path / "good", [metric_row(1)])
    garbage = write_metrics(tmp_path / "garbage", GARBAGE)
    for run, out, words_ in (
        (tmp_path / "none", "c.png", "none/metrics.jsonl cannot be read"),
        (write_metrics(tmp_path / "empty", []), "c.png", "empty/metrics.jsonl holds no line"),
        (garbage, "c.png", "garbage/metrics.jsonl holds no line with a step"),
        (good, "c.xyz", "c.xyz has an unknown ending"),
        (good, "no/such/c.png", "no/such/c.png cannot be written"),
    ):
        with pytest.raises(UserError, match=re.escape(words_)):
            curves.draw([run], tmp_path / out)
    assert not list(tmp_path.glob(".*.partial"))
    result = run_tool("curves", tmp_path / "none", "-o", tmp_path / "c.png")
    assert result.returncode == 1 and re.fullmatch("error: .*\n", result.stderr)
    assert run_tool("curves", good, "--watch", "0").returncode == 2


@pytest.mark.parametrize("tool", ["curves", "page"])
def test_only_files_are_replaced(tool, tmp_path, monkeypatch):
    """Not a device such as /dev/null, for which a pipe stands here; a link stays a link."""
    run = write_run(tmp_path / "run", [group_row(1, [words("x", 3)])])
    write_metrics(run, [metric_row(1)])
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pointed.svg")
    monkeypatch.chdir(tmp_path)

    def draw(out):
        if tool == "curves":
            curves.draw([run], Path(out))
        else:
            weights_page.write_page(run, Path(out), 9)

    for out in (".", "/", "run", "pipe"):
        with pytest.raises(UserError, match="is not a file .*; choose another -o"):
            draw(out)
    draw("link")
    assert (tmp_path / "pointed.svg").stat().st_size > 1000
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.slow
def test_long_runs_are_drawn_fast(tmp_path):
    """Three runs of 2,000 steps in less than 5 s of processor time."""
    lines = [metric_row(k) for k in range(1, 2001)]
    runs = [write_metrics(tmp_path / name, lines) for name in "abc"]
    start = time.process_time()
    curves.draw(runs, tmp_path / "c.png")
    assert time.process_time() - start < 5


@pytest.mark.slow
def test_watching_draws_again_until_interrupted(tmp_path):
    out, run = tmp_path / "c.png", tmp_path / "r"
    process = subprocess.Popen(
        command("curves", run, "-o", out, "--watch", "0.05"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        # A shell tells what it starts in the background to ignore Ctrl-C, and children inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert "0 of 1 run(s)" in process.stdout.readline() and not out.exists()
        write_metrics(run, [metric_row(1)])
        assert "1 of 1 run(s)" in process.stdout.readline()
        first = out.read_bytes()
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metric_row(2)) + "\n")
        assert "1 of 1 run(s)" in process.stdout.readline()
        assert first[:4] == b"\x89PNG" and first != out.read_bytes()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=40)
        assert process.returncode == 0 and errors == ""
    finally:
        process.kill()
        process.wait()


# -------------------------------------------------------------------------- the data of the page


@pytest.mark.slow
def test_every_clip_is_stored_once_and_a_bad_one_is_named_in_its_place(tmp_path):
    import toy

    frames = toy.draw_clip(["red"], np.random.default_rng(0))
    toy.write_mp4(tmp_path / "a.mp4", frames, toy.RATE)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    videos = [str(tmp_path / name) for name in ("a.mp4", "gone.mp4", "a.mp4", "broken.mp4")]
    rows = [group_row(k, [words("x", 3)], video=name) for k, name in enumerate(videos)]
    weights_page.write_page(write_run(tmp_path / "run", rows), tmp_path / "w.html", 200)
    text = (tmp_path / "w.html").read_text()
    clips = [json.loads(clip) for clip in re.findall(r'id="clip-\d+">(.*)</script>', text)]
    assert len(clips) == 3 and len(clips[0]["frames"]) == 4
    assert clips[1]["error"].startswith(f"clip not found: {videos[1]} (relative paths start from")
    assert clips[2]["error"].startswith(f"clip cannot be shown: {videos[3]}")


def test_any_failure_of_a_clip_is_told_in_its_place(tmp_path):
    """A picture must not end a finished training with a traceback."""

    def no_memory(*settings):
        raise MemoryError

    (tmp_path / "a.mp4").touch()
    clip = weights_page.shown_clip(str(tmp_path / "a.mp4"), CONFIG, no_memory)
    assert clip == dict(error="clip cannot be shown: MemoryError")


def test_lines_that_are_no_groups_are_left_out_and_counted(tmp_path, capsys):
    good = group_row(1, [words("x", 3)])
    short_logps = {**words("x", 3), "logps": [-1.0]}
    changes = [
        dict(weights=None),
        dict(completions=[3]),
        dict(completions=[]),
        dict(divergence=5),
        dict(weights=[1.0]),
        dict(completions=[words("x", 2)]),
        dict(completions=[short_logps]),
    ]
    bad = [{}, *({**good, **change} for change in changes)]
    rows = ["no json\n", *bad, good, json.dumps(good)[:80]]
    weights_page.write_page(write_run(tmp_path / "run", rows), tmp_path / "w.html", 200)
    assert "completions.jsonl: 9 line(s)" in capsys.readouterr().err
    assert 'id="group-0"' in (tmp_path / "w.html").read_text()


def test_the_page_says_what_is_wrong(tmp_path):
    good = [group_row(1, [words("x", 3)])]
    cases = {"none/config.json cannot be read": tmp_path / "none"}
    cases["no number above 0 for alpha"] = write_run(tmp_path / "a", good, alpha="x")
    cases["holds no group yet"] = write_run(tmp_path / "b", ["nonsense\n"])
    (write_run(tmp_path / "c", good) / "completions.jsonl").unlink()
    cases["completions.jsonl cannot be read"] = tmp_path / "c"
    (write_run(tmp_path / "d", good) / "config.json").write_text("[")
    cases["config.json is damaged"] = tmp_path / "d"
    for words_, run in cases.items():
        with pytest.raises(UserError, match=re.escape(words_)):
            weights_page.write_page(run, tmp_path / "w.html", 200)
    result = run_tool("weights_page", tmp_path / "none", "-o", tmp_path / "w.html")
    assert result.returncode == 1 and re.fullmatch("error: .*\n", result.stderr)
    assert not (tmp_path / "w.html").exists()
    assert run_tool("weights_page", tmp_path / "a", "--max_groups", "0").returncode == 2
