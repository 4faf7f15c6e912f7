"""Files that a run owns: each is written whole or not at all, and by one process at a time.

    replacing       write beside a file, then rename over it
    lock            one process at a time in a run directory or at a log
    new_directory   a fresh directory that no other process can choose too
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def flush(path: Path) -> None:
    """fsync of a file, or of a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. When the block ends without an error, that file replaces
    `path` in one step: readers and crashes see the old file or the new one, never a part.

    Raises OSError if it cannot be written; `path` is then as it was.
    """
    path = Path(os.path.realpath(path))  # a link stays a link; its target is replaced
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        flush(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def lock(path: Path) -> int | None:
    """Locks the file `path`, which is created if missing, until this process ends or closes the
    returned descriptor. None if another process holds the lock.

    The kernel drops the lock with the process, however it ends: no lock is ever stale.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def new_directory(base: Path) -> Path:
    """Creates `base`, or else base-2, base-3, ...: the first that does not exist yet. Two processes
    that start at once get two directories."""
    k = 1
    while True:
        directory = base if k == 1 else base.with_name(f"{base.name}-{k}")
        try:
            directory.mkdir(parents=True)
            return directory
        except FileExistsError:
            k += 1
