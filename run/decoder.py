"""Clips decoded ahead of the GPU, in processes that can be killed.

A decoder that hangs on a broken file cannot be timed out from inside its own process. So clips are
decoded in a process that does nothing else and imports little. On a timeout that process is killed,
the clip counts as unreadable, and a new process takes the next one.

    ClipReader    video.load_clip with a time limit
    ClipWorkers   several of them, each kept busy by a thread: futures of clips
"""

import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection
from pathlib import Path

import torch

import video
from video import Clip, VideoError

ROOT = str(Path(__file__).resolve().parent.parent)
CODE = f"import sys; sys.path.insert(0, {ROOT!r}); from run import decoder; decoder.serve()"
SERVER = [sys.executable, "-c", CODE]
START_S = 120.0  # seconds that a new process may take to import its modules


class ClipReader:
    """`video.load_clip` in a process of its own, which starts with the first clip."""

    def __init__(self, timeout: float = 60.0):
        self.timeout = timeout  # seconds for one clip
        self.process: subprocess.Popen | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def load_clip(self, path: str | os.PathLike, *settings) -> Clip:
        """As `video.load_clip`. A clip that takes too long, or crashes the decoder, is a
        VideoError too."""
        path = video.check_file(path)
        if self.process and self.process.poll() is not None:
            self.close()  # it died while idle
        if self.process is None:
            # In a session of its own, because Ctrl-C, a hangup and torchrun's SIGTERM go to the
            # whole process group, and the run still needs its clips to finish the step.
            self.process = subprocess.Popen(
                SERVER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            if self._answer(START_S) != "ready":
                raise VideoError(f"{path}: the process that decodes clips does not start")
        answer = self._answer(self.timeout, (self.timeout, path, *settings))
        if isinstance(answer, str):
            raise VideoError(f"{path}: {answer.removeprefix(f'{path}: ')}")
        frames, *when = answer
        return Clip(torch.from_numpy(frames), *when)

    def _answer(self, limit: float, request: tuple | None = None) -> object:
        """What the process answers within `limit` seconds. If it does not, it is killed, and the
        answer is a string that says so."""
        try:
            if request:
                pickle.dump(request, self.process.stdin)
                self.process.stdin.flush()
            if connection.wait([self.process.stdout], limit):
                return pickle.load(self.process.stdout)
            reason = f"not decoded within {limit:g} s"
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            reason = "the decoder crashed on it"
        self.close()
        return reason


def serve() -> None:
    """The other end of ClipReader: requests on stdin, answers on stdout, both pickled."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a cluster may send them to each process; see above
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a decoder prints must not mix in
    answer = "ready"
    while True:
        pickle.dump(answer, answers)
        answers.flush()
        try:
            limit, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, 2 * limit)  # ends us if the parent was killed
        try:
            clip = video.load_clip(*arguments)
            answer = (clip.frames.contiguous().numpy(), clip.seconds, clip.times)
        except VideoError as error:
            answer = str(error)
        signal.setitimer(signal.ITIMER_REAL, 0)


class ClipWorkers:
    """`submit(path, ...)` is a future of the clip, or of a VideoError that says why not."""

    def __init__(self, count: int, timeout: float):
        self.readers = [ClipReader(timeout) for _ in range(count)]
        self.threads = ThreadPoolExecutor(count, "clip")
        self.idle = list(self.readers)  # as many as threads, so a thread always finds one

    def submit(self, *arguments) -> Future:
        return self.threads.submit(self._load, *arguments)

    def _load(self, *arguments) -> Clip:
        reader = self.idle.pop()
        try:
            return reader.load_clip(*arguments)
        finally:
            self.idle.append(reader)

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for reader in self.readers:
            reader.timeout = 0.0  # for a clip that a thread has just started
            if process := reader.process:
                process.kill()
        self.threads.shutdown()
        for reader in self.readers:
            reader.close()
