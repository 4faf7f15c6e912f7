"""The processes that decode clips: what they return, when they are killed, and when not."""

import contextlib
import os
import shutil
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


# A decoder that dies on one name, takes a second for another, and on a third hangs without letting
# any other Python thread run.
STUCK = """
import ctypes, os, sys, time
sys.path[0] = {project!r}
import video
from run import decoder
real = video.read_clip

def read_clip(path, *settings):
    open(path + ".pid", "w").write(str(os.getpid()))
    if path.endswith("/crash.mp4"):
        os.abort()
    if path.endswith("/slow.mp4"):
        time.sleep(1)
    if path.endswith("/hang.mp4"):
        ctypes.PyDLL(None).sleep(30)
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
    for name in ("good", "slow", "hang", "crash"):
        shutil.copy(world / "clips/train_000.mp4", tmp_path / f"{name}.mp4")
    return tmp_path


def decoder_of(clip) -> int:
    """The id of the process that reads the clip, once it does."""
    written = clip.with_name(f"{clip.name}.pid")
    wait_until(lambda: written.exists() and written.read_text())
    pid = int(written.read_text())
    written.unlink()
    return pid


def test_clips_that_hang_or_crash_cost_themselves_only(stuck):
    """Also clips that other threads read meanwhile; and the end waits for none of them."""
    with ThreadPoolExecutor(3) as threads, decoder.ClipReader(timeout=2.0) as reader:
        names = ("good", "hang", "crash") * 2 + ("good",)
        futures = [threads.submit(reader.load_clip, stuck / f"{name}.mp4") for name in names]
        reasons = dict(hang="not decoded within 2 s", crash="the decoder crashed on it")
        for name, future in zip(names, futures, strict=True):
            if name == "good":
                assert len(future.result().frames) == 4
            else:
                assert str(future.exception()) == f"{stuck / name}.mp4: {reasons[name]}"
        reader.timeout = 60
        decoder_of(stuck / "hang.mp4")
        threads.submit(reader.load_clip, stuck / "hang.mp4")
        decoder_of(stuck / "hang.mp4")
    assert -signal.SIGKILL in [process.returncode for process in reader.started]


def test_signals_do_not_cost_a_clip(stuck):
    """torchrun, a terminal and a cluster send them to more than the run itself."""
    with ThreadPoolExecutor(1) as thread, decoder.ClipReader() as reader:
        clip = thread.submit(reader.load_clip, stuck / "slow.mp4")
        pid = decoder_of(stuck / "slow.mp4")
        assert os.getpgid(pid) != os.getpgid(0)  # those to the group do not reach it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        assert len(clip.result().frames) == 4


PARENT = """
import signal, sys
sys.path.insert(0, {project!r})
from run import decoder
decoder.SERVER = [sys.executable, {script!r}]
signal.signal(signal.SIGALRM, signal.SIG_IGN)  # as some launchers leave it
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
decoder.ClipReader(timeout=1.0).load_clip({clip!r})
"""


@pytest.mark.slow
def test_a_decoder_whose_parent_is_killed_ends_at_the_limit_of_its_clip(stuck):
    clip, script = stuck / "hang.mp4", str(stuck / "stuck.py")
    code = PARENT.format(project=str(PROJECT), script=script, clip=str(clip))
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    decoder_of(clip)
    parent.kill()
    parent.communicate(timeout=10)  # until the decoder, which holds the same stderr, has ended too


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
