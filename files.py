"""Atomic file operations: a file is written completely or not at all.

    replacing       write a temporary file, then rename it over the original
    lock            one process at a time in a run directory
    new_directory   a fresh directory that no other process can get as well
    read_json       a JSON object, or a sentence that says why not
    write_json      writes one atomically
    json_lines      the values of JSONL, line by line
    one_sentence    ends a command on an error that the user can fix
    brief           a library's error in one line

Here and everywhere else, such errors are raised as UserError.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """A command that cannot be carried out. The message says why and what to do instead."""


def printable(text: str) -> str:
    """Text from a file, safe to print: control characters, which a terminal would obey, become
    spaces. Line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


@contextlib.contextmanager
def one_sentence(interrupted: str = "interrupted") -> Iterator[None]:
    """Runs a command. An error that the user can fix, or Ctrl-C, ends it with a sentence on stderr
    and exit code 1."""
    try:
        yield
    except (UserError, OSError, ImportError) as error:
        raise SystemExit(f"error: {printable(str(error))}") from None
    except KeyboardInterrupt:
        raise SystemExit(interrupted) from None


def brief(error: BaseException) -> str:
    """The message of a library's error, or else its type: one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def flush(path: Path) -> None:
    """fsync of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`. When the block ends without an error, that file
    replaces `path` atomically: even after a crash, readers see the old or the new file, whole.

    Raises OSError if it cannot be written; `path` is then unchanged.
    """
    path = Path(os.path.realpath(path))  # a symlink stays; its target is replaced
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a regular file, and would be replaced", str(path))
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        flush(beside)
        os.replace(beside, path)
    except OSError as error:  # names the file that was asked for
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        beside.unlink(missing_ok=True)


def lock(path: Path) -> int | None:
    """Locks the file `path`, creating it if needed, until this process ends or closes the returned
    descriptor. Returns None if another process holds the lock.

    The kernel releases the lock however the process ends, so it never goes stale.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def new_directory(base: Path) -> Path:
    """Creates `base`, or else base-2, base-3, ...: the first that does not exist yet. Processes
    that start at the same time get different directories."""
    for k in itertools.count(1):
        directory = base if k == 1 else base.with_name(f"{base.name}-{k}")
        with contextlib.suppress(FileExistsError):
            directory.mkdir(parents=True)
            return directory


def read_json(path: Path, remedy: str, numbers: Iterable[str] = ()) -> dict:
    """The object in a JSON file. Raises a UserError ending with `remedy` if there is none, or if
    the value of one of the names in `numbers` is not an integer."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
    if not isinstance(value, dict) or not all(type(value.get(n)) is int for n in numbers):
        raise UserError(f"{path} has the wrong contents; {remedy}")
    return value


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically. Raises OSError."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def parse_json(text: str | bytes) -> object:
    """The value of JSON text. NaN and infinities, which JSON does not have, become None."""
    return json.loads(text, parse_constant=lambda name: None)


def json_lines(data: bytes) -> Iterator[tuple[int, object]]:
    """(line number from 1, value) of each non-blank line of JSONL. If a line is not JSON, its value
    is the exception that says why."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except (ValueError, RecursionError) as error:  # also: not UTF-8, or nested too deeply
                yield number, error
