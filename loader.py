"""Clips decoded ahead of the GPU, in processes that can be killed.

A decoder that hangs on a broken file cannot be timed out from inside its own process. So a clip is
decoded in a process that does nothing else, started as `python loader.py`; when the time is up it
is killed, the clip counts as unreadable, and a fresh process takes the next one.

    ClipReader    video.load_clip with a time limit
    ClipWorkers   several of them, each kept busy by a thread: futures of clips
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import torch

import video
from video import Clip, VideoError

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
            self.close()  # it died while it had nothing to do
        if self.process is None:
            command = [sys.executable, __file__]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if self._answer(START_S) != "ready":
                self.close()
                raise VideoError(f"{path}: the process that decodes clips does not start")
        pickle.dump((path, *settings), self.process.stdin)
        self.process.stdin.flush()
        answer = self._answer(self.timeout)
        if isinstance(answer, str):
            if self.process.poll() is not None:
                self.close()
            raise VideoError(f"{path}: {answer.removeprefix(f'{path}: ')}")
        frames, seconds = answer
        return Clip(torch.from_numpy(frames), seconds)

    def _answer(self, limit: float):
        """What the process says within `limit` seconds, or in words why it said nothing."""
        late = threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), self.process.kill()))
        timer.start()
        try:
            return pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):
            self.process.wait()
            return (
                f"not decoded within {limit:g} s" if late.is_set() else "the decoder crashed on it"
            )
        finally:
            timer.cancel()


def serve() -> None:
    """The other end of ClipReader: requests on stdin, answers on stdout, both pickled."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then kills us
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a decoder prints must not mix in
    answer = "ready"
    while True:
        pickle.dump(answer, answers)
        answers.flush()
        try:
            arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            clip = video.load_clip(*arguments)
            answer = (clip.frames.contiguous().numpy(), clip.seconds)
        except VideoError as error:
            answer = str(error)


class ClipWorkers:
    """`submit(path, ...)` is a future of the clip, or of a VideoError that says why there is none.

    With count = 0 the clip is decoded here and now, and nothing can be timed out.
    """

    def __init__(self, count: int, timeout: float):
        self.readers = [ClipReader(timeout) for _ in range(count)]
        self.threads = ThreadPoolExecutor(count, "clip") if count else None
        self.idle = list(self.readers)  # as many as threads, so a thread always finds one

    def submit(self, *arguments) -> Future:
        if self.threads:
            return self.threads.submit(self._load, *arguments)
        future = Future()
        try:
            future.set_result(video.load_clip(*arguments))
        except VideoError as error:
            future.set_exception(error)
        return future

    def _load(self, *arguments) -> Clip:
        reader = self.idle.pop()
        try:
            return reader.load_clip(*arguments)
        finally:
            self.idle.append(reader)

    def close(self) -> None:
        """Kills the processes, whatever they are at."""
        if self.threads:
            self.threads.shutdown(wait=False, cancel_futures=True)
        for reader in self.readers:
            if reader.process:
                reader.process.kill()


if __name__ == "__main__":
    serve()
