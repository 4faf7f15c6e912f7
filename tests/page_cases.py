"""Logs of made-up runs, for the tests of the curves and of the page of token weights."""

import json
from pathlib import Path

CONFIG = dict(alpha=1.7, divergence="official", ended_rows="uniform", model_name_or_path="no/model")
CONFIG |= dict(fps=2.0, max_frames=4, min_pixels=3136, max_pixels=3136)


def write_lines(path: Path, lines: list) -> Path:
    """Writes a JSONL file, a line for each row; text is written as it is. Returns its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    path.write_text("".join(text), encoding="utf-8")
    return path.parent


def write_run(run: Path, rows: list, **config) -> Path:
    """A run directory with config.json and completions.jsonl."""
    write_lines(run / "config.json", [CONFIG | config])
    return write_lines(run / "completions.jsonl", rows)


def completion(tokens: list[str], **other) -> dict:
    """Log-probs differ by position, and by what the completion says."""
    logps = [round(-0.25 * (k + 1) - len("".join(tokens)) / 100, 6) for k in range(len(tokens))]
    values = dict(text="".join(tokens), tokens=tokens, logps=logps, advantage=0.5)
    return {**values, "rewards": dict(accuracy=0.5, format=1.0), **other}


def words(name: str, count: int) -> dict:
    return completion([f" {name}{k}" for k in range(count)])


def group_row(step: int, completions: list[dict], **other) -> dict:
    """D and w differ at every position, so a number taken from the wrong one is noticed."""
    T = max(len(c["tokens"]) for c in completions)
    row = dict(step=step, id=f"q{step}", problem=f"What, in step {step}?", solution="A")
    row |= dict(video="no/such.mp4", completions=completions)
    row["divergence"] = [0.0] + [10.0**k + step for k in range(T - 1)]
    row["weights"] = [round(1 + 0.7 * k / max(T - 1, 1), 6) for k in range(T)]
    return {**row, **other}
