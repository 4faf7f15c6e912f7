"""The processes that decode clips: what they return, when they are killed, and when not."""

import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, wait_until

import video
from files import UserError
from run import decoder, held_out, plan
from run.clips import QuestionsAhead
from run.config import Config
from video import VideoError


def test_the_clip_reader_returns_what_load_clip_does(world):
    path = world / "clips/train_000.mp4"
    expected = video.load_clip(path)
    with decoder.ClipReader() as reader:
        for _ in range(2):
            clip = reader.load_clip(path)
            assert clip.seconds == expected.seconds and torch.equal(clip.frames, expected.frames)
        for name, reason in (("gone.mp4", "no such video"), ("train.jsonl", "cannot be decoded")):
            with pytest.raises(VideoError, match=f"{name}: {reason}"):
                reader.load_clip(world / name)
        (process,) = reader.started  # one served them all
        assert process.poll() is None


# A decoder that hangs on one name, dies on another, and on a third hangs without letting any other
# Python thread run.
STUCK = """
import ctypes, os, sys, time
sys.path[0] = {project!r}
import video
from run import decoder
real = video.read_clip

def read_clip(path, *settings):
    name = os.path.basename(path)
    if name in ("hang.mp4", "hold.mp4", "slow.mp4"):
        open(path + ".pid", "w").write(str(os.getpid()))
    if name == "hold.mp4":
        ctypes.PyDLL(None).sleep(30)
    time.sleep(dict(hang=30, slow=1).get(name.removesuffix(".mp4"), 0))
    if name == "crash.mp4":
        os.abort()
    return real(path, *settings)

video.read_clip = read_clip
decoder.serve()
"""


@pytest.fixture
def stuck(world, tmp_path, monkeypatch):
    """A directory of clips that are all the same, and a decoder that goes by their names."""
    script = tmp_path / "stuck.py"
    script.write_text(STUCK.format(project=str(PROJECT)))
    monkeypatch.setattr(decoder, "SERVER", [sys.executable, str(script)])
    good = (world / "clips/train_000.mp4").read_bytes()
    for name in ("good", "hang", "hold", "slow", "crash"):
        (tmp_path / f"{name}.mp4").write_bytes(good)
    return tmp_path


def test_clips_that_hang_or_crash_cost_themselves_only(stuck):
    """Also clips that other threads read meanwhile; and the end waits for none of them."""
    with ThreadPoolExecutor(3) as threads, decoder.ClipReader(timeout=2.0) as reader:
        names = ("good", "hold", "crash") * 2 + ("good",)
        futures = [threads.submit(reader.load_clip, stuck / f"{name}.mp4") for name in names]
        reasons = dict(hold="not decoded within 2 s", crash="the decoder crashed on it")
        for name, future in zip(names, futures, strict=True):
            if name == "good":
                assert len(future.result().frames) == 4
            else:
                assert str(future.exception()) == f"{stuck / name}.mp4: {reasons[name]}"
        reader.timeout = 60
        threads.submit(reader.load_clip, stuck / "hang.mp4")
        wait_until((stuck / "hang.mp4.pid").exists)
    assert -signal.SIGKILL in [process.returncode for process in reader.started]


def test_training_evaluation_and_a_dry_run_keep_to_the_limit(
    world, policy, prompter, records, monkeypatch, capsys
):
    """A time in which no clip can be read, so each of them skips its only question."""
    small = dict(max_frames=4, min_pixels=3136, max_pixels=3136, max_completion_length=4)
    cfg, records = Config(str(world / "model"), "-", clip_timeout=0.001, **small), records[:1]
    monkeypatch.setattr(plan, "training_records", lambda cfg: records)
    with pytest.raises(UserError, match="none of the first 3 clips can be read"):
        plan.show(cfg)
    with pytest.raises(UserError, match="none of the 1 clips to evaluate on can be read"):
        held_out.measure(cfg, policy, prompter, records)
    log = SimpleNamespace(counts=dict(asked=0, skipped=0), note=lambda key, text: print(text))
    with contextlib.closing(QuestionsAhead(cfg, records, prompter, log, first_step=1)) as ahead:
        assert ahead.take(1)[0] == [] and log.counts == dict(asked=1, skipped=1)
    assert "".join(capsys.readouterr()).count(".mp4: not decoded within 0.001 s") == 3


# --------------------------------------------------------------------------- signals and orphans

PARENT = """
import signal, sys
sys.path.insert(0, {project!r})
from run import decoder
decoder.SERVER = [sys.executable, {script!r}]
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: None)  # as a run that first finishes its step
signal.signal(signal.SIGALRM, signal.SIG_IGN)  # as some launchers leave it
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
clip = decoder.ClipReader({timeout}).load_clip(sys.argv[1])
print(len(clip.frames))
"""


def start_parent(stuck, name, timeout=60.0):
    """A process, leading a group of its own, that reads the clip; and its decoder's id. Both have
    ended when `communicate` returns: the decoder too holds the parent's stderr."""
    code = PARENT.format(project=str(PROJECT), script=str(stuck / "stuck.py"), timeout=timeout)
    command = [sys.executable, "-c", code, str(stuck / name)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    parent = subprocess.Popen(command, **pipes, start_new_session=True)
    pid_file = stuck / f"{name}.pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    return parent, int(pid_file.read_text())


@pytest.mark.slow
def test_a_signal_to_the_whole_group_does_not_cost_a_clip(stuck):
    """torchrun, a terminal and a cluster send them to more than the run itself."""
    parent, decoder = start_parent(stuck, "slow.mp4")
    assert os.getpgid(decoder) != os.getpgid(parent.pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.killpg(parent.pid, number)
        os.kill(decoder, number)
    assert parent.communicate(timeout=20)[0] == b"4\n"


@pytest.mark.slow
def test_a_decoder_whose_parent_is_killed_ends_at_the_limit_of_its_clip(stuck):
    parent, _ = start_parent(stuck, "hold.mp4", 1.0)
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate(timeout=10)
