"""Published evaluation logs, scored again by this project, as a file the documents can cite.

    python -m benchmarks.rescore "MMVU, TW-GRPO=LOG.json" "MMVU, zero-shot=LOG.json" ...

Each argument is NAME=LOG, a log of the official repository (aa529ff, logs/). Writes
benchmarks/rescored.json; docs/prompts.md shows it.
"""

import argparse
import json
from pathlib import Path

from tools import score

OUT = Path(__file__).with_name("rescored.json")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", nargs="+", metavar="NAME=LOG")
    logs = parser.parse_args().logs
    for argument in logs:
        if "=" not in argument:
            parser.error(f"{argument}: give it a name, as in 'MMVU={argument}'")
    rows = [row(*argument.split("=", 1)) for argument in logs]
    OUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(OUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
