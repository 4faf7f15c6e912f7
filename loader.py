"""Clips decoded ahead of the GPU, in processes that can be killed.

A decoder that hangs on a broken file cannot be timed out from inside its own process. So each
worker is a spawned process, and a thread of this one does nothing but wait for it: when the time is
up the process is killed, the clip counts as unreadable, and a fresh process takes the next one.
"""

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import video

START_S = 120  # seconds that a new worker may take to import its modules


def _serve(pipe, decode: Callable) -> None:
    """What a worker process does: clip after clip, until it is killed or the pipe is closed."""
    pipe.send("ready")
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, decode(*arguments)))
        except video.VideoError as error:
            pipe.send((False, str(error)))


class ClipWorkers:
    """`submit(path, ...)` is a future of `decode(path, ...)`, or of a VideoError that says why not.

    With count = 0 the clip is decoded here and now, and nothing can be timed out.
    """

    def __init__(self, count: int, timeout_s: float, decode: Callable = video.load_clip):
        self.timeout_s, self.decode = timeout_s, decode
        self.context = multiprocessing.get_context("spawn")  # a fork would inherit CUDA and locks
        self.threads = ThreadPoolExecutor(count, "clip") if count else None
        self.mine = threading.local()  # the worker of each thread: (process, pipe)
        self.processes = []

    def submit(self, *arguments) -> Future:
        if self.threads:
            return self.threads.submit(self._decode, *arguments)
        future = Future()
        try:
            future.set_result(self.decode(*arguments))
        except video.VideoError as error:
            future.set_exception(error)
        return future

    def _decode(self, *arguments):
        process, pipe = getattr(self.mine, "worker", (None, None))
        if process is None or not process.is_alive():
            process, pipe = self.mine.worker = self._spawn()
        try:
            pipe.send(arguments)
            if not pipe.poll(self.timeout_s):
                raise video.VideoError(f"{arguments[0]}: not decoded within {self.timeout_s:g} s")
            done, value = pipe.recv()
        except (EOFError, OSError):
            self._kill(process)
            raise video.VideoError(f"{arguments[0]}: the decoder crashed on it") from None
        except video.VideoError:
            self._kill(process)
            raise
        if not done:
            raise video.VideoError(value)
        return value

    def _spawn(self):
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, self.decode), daemon=True)
        process.start()
        theirs.close()
        self.processes.append(process)
        if not ours.poll(START_S):
            self._kill(process)
            raise RuntimeError(f"a clip worker did not start within {START_S} s")
        ours.recv()
        return process, ours

    def _kill(self, process) -> None:
        process.kill()
        process.join()
        self.processes.remove(process)
        self.mine.worker = (None, None)

    def close(self) -> None:
        """Kills the workers, whatever they are at."""
        if self.threads:
            self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.kill()
