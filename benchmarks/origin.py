"""Where a measurement comes from, as files of results name it: code, day, versions, machine."""

import contextlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "numpy")


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


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return dict(cpu=cpu, cores=os.cpu_count())


def surroundings() -> dict:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return dict(date=datetime.now(UTC).date().isoformat(), versions=versions, machine=machine())
