"""Results of measurements: their rows, and where they come from (code, day, versions, machine)."""

import contextlib
import gc
import json
import math
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from files import replacing

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "numpy", "flash-attn", "liger-kernel", "trl",
            "quack-kernels", "cut-cross-entropy")  # fmt: skip
OUT_OF_MEMORY = "out of memory"


def git(*arguments: str) -> str:
    """What git answers; nothing outside a checkout."""
    with contextlib.suppress(OSError):
        answer = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else ""
    return ""


def source() -> dict:
    """The commit of the code, and whether tracked files differ from it; null outside a checkout."""
    commit = git("rev-parse", "--short", "HEAD") or None
    dirty = bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None
    return dict(commit=commit, dirty=dirty)


def processor() -> str:
    with contextlib.suppress(OSError, StopIteration):  # elsewhere than on Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        return name.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def provenance() -> dict:
    """Where a measurement comes from: commit, date, versions and machine."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    date = datetime.now(UTC).date().isoformat()
    return source() | dict(
        date=date, versions=versions, machine=dict(cpu=processor(), cores=os.cpu_count())
    )


def device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


class Results:
    """Measured rows. The file, if there is one, is replaced as a whole after every row.

    A file that is there already is continued if it is of the same code, versions and device, else
    refused (SystemExit): nothing measured is ever lost or mixed. `columns`: {name: format} of what
    is printed. After `minutes` nothing new begins.
    """

    def __init__(self, path: Path | None, columns: dict[str, str], minutes: float = math.inf):
        self.path, self.columns, self.end = path, columns, time.monotonic() + 60 * minutes
        self.about = dict(device=device()) | provenance()
        self.rows = []
        if path and path.exists():
            earlier = read(path)
            changed = [key for key in ("device", "commit", "dirty", "versions")
                       if earlier[key] != self.about[key]]  # fmt: skip
            if changed:
                raise SystemExit(
                    f"error: {path}: holds results of another {' and '.join(changed)}; "
                    "write to another file"
                )
            self.about, self.rows = self.about | {"date": earlier["date"]}, earlier["rows"]
        print(heading(columns), flush=True)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end

    def find(self, **key) -> dict | None:
        """The row with these values, if it was measured, or was too large to be."""
        found = (row for row in self.rows if key.items() <= row.items())
        return next((r for r in found if r.get("failed", OUT_OF_MEMORY) == OUT_OF_MEMORY), None)

    @property
    def broken(self) -> bool:
        """Has anything failed, other than for want of memory?"""
        return any(row.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in self.rows)

    def add(self, key: dict, row: dict) -> dict:
        """Writes the row `key | row`, in the place of one with this key that failed."""
        self.rows = [row for row in self.rows if not key.items() <= row.items()]
        row = key | row
        self.rows.append(row)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as beside:
                beside.write_text(self.json(1) + "\n", encoding="utf-8")
        print(line(row, self.columns), flush=True)
        return row

    def measure(self, work: Callable[[], dict], **key) -> dict | None:
        """The row `key | work()`, measured now unless it is there already; None once the time is
        over. Work that fails is a row as well, with the reason as `failed`."""
        if found := self.find(**key):
            return found
        if self.over:
            print(f"left out, the time is over: {json.dumps(key)}", flush=True)
            return None
        try:
            row = work()
        except (torch.OutOfMemoryError, MemoryError):
            row = dict(failed=OUT_OF_MEMORY)
        except Exception as problem:  # one that fails, perhaps another's, does not end the rest
            traceback.print_exc()
            reason = (str(problem).strip().splitlines() or [""])[0][:200]
            row = dict(failed=f"{type(problem).__name__}: {reason}")
        if "failed" in row:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return self.add(key, row)

    def json(self, indent: int | None = None) -> str:
        return json.dumps(self.about | dict(rows=self.rows), indent=indent)


def read(path: Path) -> dict:
    """A file of `Results`. Raises SystemExit if it is none."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        if not {"device", "commit", "dirty", "versions", "date", "rows"} <= results.keys():
            raise ValueError("it lacks what Results writes")
        return results
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"error: {path}: not a file of results ({error})") from None


def heading(columns: dict[str, str]) -> str:
    return "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)


def line(row: dict, columns: dict[str, str]) -> str:
    cells = [format(row[c], f) if row.get(c) is not None else "" for c, f in columns.items()]
    return "| " + " | ".join([*cells, *([row["failed"]] if "failed" in row else [])]) + " |"


def markdown(path: Path, columns: dict[str, str]) -> str:
    """A results file as the README shows it, with the mark by which a test finds the figures."""
    results, path = read(path), Path(path).resolve()
    name = path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join([
        f"{results['device']}, {results['date']}, commit {results['commit']}, {versions}\n",
        f"<!-- figures: {name} -->", heading(columns),
        *(line(row, columns) for row in results["rows"]),
    ])  # fmt: skip
