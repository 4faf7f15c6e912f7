"""A run's own files: each is written completely or not at all.

    replacing       write beside a file, then rename over it
    lock            one process at a time in a run directory
    new_directory   a fresh directory that no other process can choose too
    read_json       a JSON object, or a sentence that says why not
    json_lines      the values of JSONL, line by line

Here and everywhere else, what a user can fix is raised as a UserError.
"""

import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """A command that cannot be carried out. The message says why, and what to do instead."""


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
    `path` in one step: readers and crashes see the old file or the new one, never a part of it.

    Raises OSError if it cannot be written; `path` is then unchanged.
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
    for k in itertools.count(1):
        directory = base if k == 1 else base.with_name(f"{base.name}-{k}")
        with contextlib.suppress(FileExistsError):
            directory.mkdir(parents=True)
            return directory


def read_json(path: Path, remedy: str, numbers: Iterable[str] = ()) -> dict:
    """The object in a JSON file. If there is none, or what it holds under one of the names in
    `numbers` is not an integer, raises a UserError that ends with `remedy`."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
    if not isinstance(value, dict) or not all(type(value.get(n)) is int for n in numbers):
        raise UserError(f"{path} does not hold what it should; {remedy}")
    return value


def json_lines(data: bytes) -> Iterator[tuple[int, object]]:
    """(line number from 1, value) of each line of JSONL that is not blank. The value of a line that
    is not JSON is the exception that says why; NaN and infinities, which JSON has not, are None."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line, parse_constant=lambda name: None)
            except (ValueError, RecursionError) as error:  # also: not UTF-8, nested without end
                yield number, error
