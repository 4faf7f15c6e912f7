"""Published evaluation logs, scored again by this project, as a file the documents can cite.

    python -m benchmarks.rescore "MMVU, TW-GRPO=LOG.json" "MMVU, zero-shot=LOG.json" ...

Each argument is NAME=LOG, a log of the official repository (aa529ff, logs/). Writes
benchmarks/rescored.json; docs/prompts.md shows it.
"""

import argparse
import json
from pathlib import Path

from tools import score

OUT = Path(__file__).resolve().parent / "rescored.json"


def row(name: str, path: str) -> dict:
    log = score.read_log(path)
    summary = score.summarize(log)
    overall = summary.shares["overall"]
    return dict(
        log=name,
        questions=overall.questions,
        strict=overall.strict,
        interval=list(overall.strict_interval),
        soft=overall.soft,
        format=summary.form,
        fit_no_rule=sum(summary.unfit.values()),
        repeated_rows=len(log.duplicates),
        rows_whose_logged_score_is_another=summary.disagreements,
    )


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    top.add_argument("logs", nargs="+", metavar="NAME=LOG")
    top.add_argument("--json", default=str(OUT))
    return top


def main() -> None:
    args = parser().parse_args()
    for argument in args.logs:
        if "=" not in argument:
            raise SystemExit(f"error: {argument}: give it a name, as in 'MMVU={argument}'")
    rows = [row(*argument.split("=", 1)) for argument in args.logs]
    Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for line in rows:
        print(line)


if __name__ == "__main__":
    main()
