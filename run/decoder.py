"""Decodes clips in processes that can be killed.

A decoder that hangs on a broken file cannot be timed out from Python in its own process. So clips
are decoded in a separate process that imports little. At the time limit the kernel kills it, the
clip counts as unreadable, and a new process takes the next one.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import torch

import video
from video import Clip, VideoError

ROOT = str(Path(__file__).resolve().parent.parent)
CODE = f"import sys; sys.path.insert(0, {ROOT!r}); from run import decoder; decoder.serve()"
SERVER = [sys.executable, "-c", CODE]


class ClipReader:
    """`video.load_clip` with a time limit. Thread-safe: each call takes an idle process or starts
    a new one."""

    def __init__(self, timeout: float = 60.0):
        self.timeout = timeout  # seconds for one clip, once its process has started
        self.started: list[subprocess.Popen] = []
        self.idle: list[tuple[subprocess.Popen, Connection]] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self.timeout = 0.001  # for a clip that another thread is about to start
        for process in self.started:
            process.kill()
            process.wait()

    def load_clip(self, path: str | os.PathLike, *settings) -> Clip:
        """Like `video.load_clip`. A clip that takes too long or crashes the decoder also raises
        VideoError."""
        path = video.check_file(path)
        process, pipe = self._idle_or_new()
        try:
            pipe.send((self.timeout, path, *settings))
            answer = pipe.recv()
        except (EOFError, OSError):
            reason = "the decoder crashed on it"
            if process.wait() == -signal.SIGALRM:
                reason = f"not decoded within {self.timeout:g} s"
            raise VideoError(f"{path}: {reason}") from None
        self.idle.append((process, pipe))
        if isinstance(answer, VideoError):
            raise answer
        return dataclasses.replace(answer, frames=torch.from_numpy(answer.frames))

    def _idle_or_new(self) -> tuple[subprocess.Popen, Connection]:
        """An idle process, and our end of the pipe to it."""
        with contextlib.suppress(IndexError):  # none is idle
            while True:
                process, pipe = self.idle.pop()
                if process.poll() is None:  # it may have died while idle
                    return process, pipe
        ours, its_own = Pipe()
        # In its own session, because Ctrl-C, a hangup and torchrun's SIGTERM go to the whole
        # process group, and the run still needs clips to finish the step.
        process = subprocess.Popen(
            [*SERVER, str(its_own.fileno())],
            stdout=subprocess.DEVNULL,
            pass_fds=[its_own.fileno()],
            start_new_session=True,
        )
        self.started.append(process)
        its_own.close()
        return process, ours


def serve() -> None:
    """Serves the other end of ClipReader's pipe, given by its file descriptor."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a cluster may signal each process; see above
    # A parent may have it ignored or blocked, which is inherited.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    torch.set_num_threads(1)  # several decoders share the cores, as DataLoader's workers do
    pipe = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, OSError):  # the run has ended
        while True:
            limit, *arguments = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, limit)  # SIGALRM comes even if the run was killed
            try:
                clip = video.load_clip(*arguments)
                answer = dataclasses.replace(clip, frames=clip.frames.contiguous().numpy())
            except VideoError as error:
                answer = error
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(answer)
