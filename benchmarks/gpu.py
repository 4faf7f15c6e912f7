"""What a GPU has to show, in one command that stays within its minutes.

    python -m benchmarks.gpu --minutes 9 --out runs/h200        # everything
    python -m benchmarks.gpu --minutes 9 --out runs/h200 --part step
    python -m benchmarks.gpu --table --out runs/h200            # the README's tables

correctness  the tests only a GPU can run as they are: bf16, memory, captured decoding, packing
kernels      the head beside its ceiling and the alternatives installed (`benchmarks.head`)
step         one training step by phase, ours and the official way (`benchmarks.step`)

Each part is a process of its own and writes OUT/PART.json after every result. Run again on the same
code and device, the command measures what is missing. A part that hangs is ended when its minutes
are over. On a CPU it says what it leaves out and exits 0.
"""

import argparse
import collections
import faulthandler
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import head, origin, step
from benchmarks.origin import PROJECT, Results
from model.packing import ATTENTION

TESTS = ["test_kernels_cuda.py", "test_packing.py", "test_policy.py", "test_kernels.py",
         "test_ranks.py::test_two_gpus_train_like_one"]  # fmt: skip
PROMPT, COMPLETIONS = 1100, (170, 400)  # tokens
OUTCOMES = dict(test="", outcome="", seconds=".1f")


class Recorder:
    """A pytest plugin: writes each test's outcome as it ends, and ends with the minutes."""

    def __init__(self, results: Results):
        self.results = results

    def pytest_collection_modifyitems(self, session, items) -> None:
        self.session = session
        items[:] = [item for item in items if not self.results.find(test=item.nodeid)]

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.results.add(dict(test=report.nodeid), dict(failed="cannot be imported"))

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or not report.passed:
            row = dict(outcome=report.outcome, seconds=report.duration)
            if report.skipped:
                row["reason"] = report.longrepr[2]
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                why = crash.message if crash else report.longreprtext
                row["failed"] = (why.strip().splitlines() or ["failed"])[0]
            self.results.add(dict(test=report.nodeid), row)

    def pytest_runtest_logfinish(self) -> None:
        if self.results.over:
            self.session.shouldstop = "the minutes are over; the same command goes on from here"


def correctness(args: argparse.Namespace, results: Results) -> None:
    if not torch.cuda.is_available():
        return print("left out: `python -m pytest` is the command for a machine without GPU")
    import pytest  # of the test requirements

    files = [str(PROJECT / "tests" / name) for name in TESTS]
    # pytest's own faulthandler would call off the one that ends a part.
    options = ["-n", "0", "-q", "-p", "no:faulthandler", "-c", str(PROJECT / "pyproject.toml")]
    code = pytest.main([*options, *files], plugins=[Recorder(results)])
    if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
        raise SystemExit("error: pytest could not run the tests, see above")


def kernels(args: argparse.Namespace, results: Results) -> None:
    head.run(head.SHAPES, results)


def one_step(args: argparse.Namespace, results: Results) -> None:
    if args.size != "tiny" and not torch.cuda.is_available():
        return print(f"left out: {args.size} needs a CUDA device; --size tiny runs anywhere")
    flags = ["--size", args.size, "--prompt", str(PROMPT), "--optimizer", "sgd"]
    flags += ["--gradient_checkpointing", "--completion", *map(str, COMPLETIONS)]
    step.run(step.parser().parse_args([*flags, "--attn_implementation", *ATTENTION]), results)


PARTS = dict(
    correctness=(correctness, OUTCOMES),
    kernels=(kernels, head.COLUMNS),
    step=(one_step, step.COLUMNS),
)


def table(out: Path) -> str:
    """The files of `out` as the README shows them; of the tests, the number of each outcome and
    what failed."""
    parts = []
    for part, (_, columns) in PARTS.items():
        path = out / f"{part}.json"
        if path.exists() and part == "correctness":
            rows = origin.read(path)["rows"]
            counts = collections.Counter(row.get("outcome", "failed") for row in rows)
            parts.append(", ".join(f"{n} tests {outcome}" for outcome, n in counts.items()))
            parts += [f"- {row['test']}: {row['failed']}" for row in rows if "failed" in row]
        elif path.exists():
            parts.append(origin.markdown(path, columns))
    return "\n\n".join(parts) or f"{out}: no results yet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="of all parts together")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="directory of results")
    parser.add_argument("--part", choices=PARTS, help="one of the three")
    parser.add_argument("--size", choices=step.SIZES, default="7b", help="model of the step")
    parser.add_argument("--table", action="store_true", help="print what is there and stop")
    args = parser.parse_args()
    if args.table:
        return print(table(args.out))
    if not 0 < args.minutes <= 24 * 60:
        parser.error(f"--minutes must be above 0 and at most a day (1440), not {args.minutes}")
    end = time.monotonic() + 60 * args.minutes
    if args.part:
        faulthandler.dump_traceback_later(60 * args.minutes, exit=True)
        measure, columns = PARTS[args.part]
        print(f"\n{args.part}, {args.minutes:.1f} minutes", flush=True)
        results = Results(args.out / f"{args.part}.json", columns, 0.9 * args.minutes)
        measure(args, results)
        raise SystemExit(int(results.broken))
    failed = []
    for k, part in enumerate(PARTS):  # what one leaves of its minutes goes to the next
        minutes = max((end - time.monotonic()) / 60 / (len(PARTS) - k), 0.1)
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--size", args.size]
        command += ["--minutes", str(minutes), "--out", str(args.out.resolve())]
        failed += [part] if subprocess.run(command, cwd=PROJECT).returncode else []
    print(table(args.out))
    if failed:
        raise SystemExit(f"error: not all of this worked: {', '.join(failed)}; see above")


if __name__ == "__main__":
    main()
