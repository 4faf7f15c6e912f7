"""Runs that are killed and go on: bit for bit the run that was never interrupted."""

import os
import random
import signal
import subprocess
import time

import pytest
import torch
from conftest import run_twgrpo, twgrpo_command
from safetensors.torch import load_file
from test_train import metrics

import checkpoint
from policy import Policy

KILLS = int(os.environ.get("TWGRPO_KILLS", 2))  # CI keeps it short; 10 for the real thing
STEPS = 4 + 4 * KILLS
FLAGS = f"--max_steps {STEPS} --save_steps 2 --learning_rate 1e-3 --logging_steps 1".split()


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "r"
    result = run_twgrpo(world, out, *FLAGS)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(whole, world, tmp_path):
    """kill -9 anywhere, also while a checkpoint is written, then --resume_from_checkpoint auto."""
    out, rng = tmp_path / "r", random.Random(0)
    command = twgrpo_command(world, out, *FLAGS, "--resume_from_checkpoint", "auto")
    for _ in range(KILLS):
        before = len(metrics(out)) if (out / "metrics.jsonl").exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 90
        saving = rng.random() < 0.5  # half of the kills while a checkpoint is being written
        while process.poll() is None and time.monotonic() < deadline:
            if saving and list(out.glob(".checkpoint*")):
                break
            if not saving and (out / "metrics.jsonl").exists() and len(lines(out)) > before:
                time.sleep(rng.random() * 0.2)
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        newest = checkpoint.find(out, "auto")
        if newest:
            Policy.load(newest)  # what is there is whole
            done = int(newest.name.rpartition("-")[2])
            assert len(lines(out)) - done <= 2 + 1  # no more than --save_steps are lost
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert metrics(out) == metrics(whole)
    ours, theirs = (
        load_file(r / f"checkpoint-{STEPS}" / "model.safetensors") for r in (out, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def lines(out):
    return (out / "metrics.jsonl").read_bytes().splitlines()


def test_only_the_newest_checkpoint_keeps_its_trainer_state(whole):
    assert {p.parent.name for p in whole.glob("checkpoint-*/trainer_state")} == {
        f"checkpoint-{STEPS}"
    }
    assert len(list(whole.glob("checkpoint-*"))) == STEPS // 2
    with pytest.raises(checkpoint.CheckpointError, match="checkpoint-2: holds no trainer_state"):
        checkpoint.find(whole, str(whole / "checkpoint-2"))


def test_rows_after_the_checkpoint_are_moved_aside_not_lost(tmp_path):
    rows = [f'{{"step": {k}, "loss": 0}}\n' for k in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows) + '{"step": 6, "lo')
    checkpoint.move_aside_later_rows(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(rows[:3])
    later = (tmp_path / "metrics.jsonl.after-3").read_text()
    assert later == "".join(rows[3:]) + '{"step": 6, "lo'


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB: room for one checkpoint of the toy, not for two."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_an_error_and_the_older_checkpoint_stays(small_disk, world):
    result = run_twgrpo(world, small_disk / "r", *FLAGS)
    assert result.returncode == 1, result.stderr[-3000:]
    assert "checkpoint-4 could not be written" in result.stderr
    assert "Traceback" not in result.stderr
    newest = checkpoint.find(small_disk / "r", "auto")
    assert newest.name == "checkpoint-2" and not list((small_disk / "r").glob(".*partial"))
    Policy.load(newest)


def test_a_read_only_directory_is_an_error_and_what_it_holds_stays(small_disk, world):
    """Root may write where permissions say no, so the file system itself is read-only here."""
    short = ("--save_only_model", "true", "--max_steps", "1")
    assert run_twgrpo(world, small_disk / "r", *short).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in small_disk.rglob("*")}
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for flags in (("--resume_from_checkpoint", "auto"), ("--output_dir", str(small_disk / "new"))):
        result = run_twgrpo(world, small_disk / "r", *flags)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert "cannot be written: Read-only file system" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in small_disk.rglob("*")} == before


def test_save_only_model_leaves_no_trainer_state(world, tmp_path):
    run_twgrpo(world, tmp_path / "r", "--save_only_model", "true")
    assert (tmp_path / "r" / "checkpoint-2" / "model.safetensors").exists()
    assert not list((tmp_path / "r").rglob("trainer_state"))


def test_too_many_unreadable_clips_end_the_run_with_a_checkpoint(world, tmp_path):
    row = '{"problem": "?", "solution": "A", "video": "%s"}\n'
    good = "clips/train_000.mp4"
    (tmp_path / "q.jsonl").write_text(row % good + 7 * (row % "missing.mp4"))
    flags = ["--jsonl_path", str(tmp_path / "q.jsonl"), "--max_steps", "40"]
    result = run_twgrpo(world, tmp_path / "r", *flags)
    assert result.returncode == 1 and "--max_skip_fraction 0.05 allows" in result.stderr
    assert list((tmp_path / "r").glob("checkpoint-*/trainer_state"))


def test_workers_ahead_change_nothing(whole, world, tmp_path):
    result = run_twgrpo(world, tmp_path / "r", *FLAGS, "--dataloader_num_workers", "2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert metrics(tmp_path / "r") == metrics(whole)


def test_dry_run_shows_the_plan_and_touches_nothing(world, tmp_path):
    result = run_twgrpo(world, tmp_path / "r", "--dry_run", "true")
    assert result.returncode == 0, result.stderr[-3000:]
    for words in ("<|video_pad|>", "4 frames x 56 x 56 pixels, 0.58 s apart = 8 video tokens",
                  "= during the rollout", "passes over 24 questions"):  # fmt: skip
        assert words in result.stdout
    assert not list((tmp_path / "r").glob("*"))


def test_dry_run_names_what_is_wrong(world, tmp_path):
    (tmp_path / "q.json").write_text('[{"problem": "?", "solution": "A", "video": "no.mp4"}]')
    flags = ["--jsonl_path", str(tmp_path / "q.json"), "--dry_run", "true"]
    result = run_twgrpo(world, tmp_path / "r", *flags)
    assert result.returncode == 1 and "no.mp4: no such video file" in result.stdout
    assert "error: none of the first" in result.stderr and "Traceback" not in result.stderr
