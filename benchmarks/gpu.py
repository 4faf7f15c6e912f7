"""Runs what needs a GPU, one part per call: the CUDA tests, the head, the training step.

    python -m benchmarks.gpu tests
    python -m benchmarks.gpu head --out benchmarks/h200

Each row is written as it is measured, so an interrupted part continues where it stopped.
"""

import argparse
import subprocess
import sys

PARTS = {
    "tests": "pytest -n 0 -v tests/test_kernels_cuda.py tests/test_decode.py tests/test_packing.py "
    "tests/test_policy.py tests/test_kernels.py",
    "head": "benchmarks.head --json {out}/head.json",
    "step": "benchmarks.step --size 7b --prompt 1100 --completion 170 400 --json {out}/step.json",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", default="runs/gpu", help="directory for the JSON files")
    args = parser.parse_args()
    command = PARTS[args.part].format(out=args.out).split()
    raise SystemExit(subprocess.run([sys.executable, "-m", *command]).returncode)


if __name__ == "__main__":
    main()
