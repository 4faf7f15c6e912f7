"""Measurements: timing, provenance, and the file that keeps their rows."""

import gc
import json
import os
import platform
import re
import statistics
import subprocess
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from files import replacing
from run.log import SECONDS

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = "torch triton transformers numpy flash_attn flash-attn liger_kernel trl".split()


def provenance() -> dict:
    """Where a measurement comes from: commit (with "-dirty" if tracked files differ from it; empty
    outside a checkout), date, device, versions and machine."""
    git = "git describe --always --dirty --exclude '*'"
    git = subprocess.run(git, shell=True, cwd=PROJECT, capture_output=True, text=True)
    info = Path("/proc/cpuinfo")  # on Linux
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    installed = {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}
    on_cuda, threads = torch.cuda.is_available(), torch.get_num_threads()
    return dict(
        commit=git.stdout.strip(),
        date=datetime.now(UTC).date().isoformat(),
        device=torch.cuda.get_device_name() if on_cuda else f"cpu, {threads} threads",
        versions={"python": platform.python_version()} | installed,
        machine=dict(cpu=names[0] if names else platform.machine(), cores=os.cpu_count()),
    )


def medians(work: Callable[[], object], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Runs `work` `warm_up` times, to compile, load and allocate, then `repeats` times. Returns the
    median seconds spent in each `run.log.phase`, by name. Afterwards the GPU's peak memory is that
    of the last repeat."""
    rows = []
    for _ in range(warm_up + repeats):
        SECONDS.clear()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        work()
        rows.append(dict(SECONDS))
    return {name: statistics.median(row[name] for row in rows[warm_up:]) for name in rows[-1]}


class Results:
    """Measured rows, printed and, given a file, written to it as they come. Continues an existing
    file unless it comes from another device, commit or version (SystemExit)."""

    def __init__(self, path: Path | None):
        self.path, self.about, self.rows = path, provenance(), []
        if path and path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            for key in ("device", "commit", "versions"):
                if earlier[key] != self.about[key]:
                    raise SystemExit(f"error: {path} is from another {key}; write to another file")
            self.rows = earlier["rows"]
        print(json.dumps(self.about), flush=True)

    def find(self, **key) -> dict | None:
        """The row with these values, unless its measurement failed; else None."""
        own = (row for row in self.rows if key.items() <= row.items() and "failed" not in row)
        return next(own, None)

    def add(self, key: dict, row: dict) -> dict:
        """Stores the row `key | row`, replacing any with this key."""
        row = key | row
        self.rows = [other for other in self.rows if not key.items() <= other.items()] + [row]
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.about | dict(rows=self.rows), indent=1)
            with replacing(self.path) as beside:
                beside.write_text(text + "\n", encoding="utf-8")
        short = {k: v for k, v in row.items() if not isinstance(v, dict | list)}
        print(json.dumps(short), flush=True)
        return row

    def measure(self, work: Callable[..., dict], **key) -> dict:
        """The row `key | work(**key)`, measured now unless it exists. If that fails, "failed" says
        why, and the next measurement can still run."""
        if found := self.find(**key):
            return found
        try:
            row = work(**key)
        except Exception as problem:  # perhaps out of memory, or an error in another package
            traceback.print_exc()
            row = dict(failed=f"{type(problem).__name__}: {problem}")
        gc.collect()
        torch.cuda.empty_cache()
        return self.add(key, row)


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table, with a column for every name in any of them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "") for name in names] for row in rows]
    cells = [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in line] for line in cells]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
