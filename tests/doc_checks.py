"""Parts of the Markdown documents, and the numbers in their tables.

A comment on the line before a table says where its numbers come from:

    <!-- figures: benchmarks/NAME.json -->   they stand in that file
    <!-- computed: tests/x.py::test_y -->    that test computes them again
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Table:
    mark: str  # the comment before it, or ""
    header: list[str]
    rows: list[list[str]]


def prose(text: str) -> str:
    """The document without its fenced blocks."""
    return FENCE.sub("", text)


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def tables(text: str) -> list[Table]:
    found = []
    pattern = r"(?:^<!--\s*(.*?)\s*-->\n+)?((?:^\|.*\n)+)"
    for mark, lines in re.findall(pattern, prose(text) + "\n", re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in lines.splitlines()]
        rows = [[cell.strip() for cell in row] for row in rows]
        found.append(Table(mark, rows[0], rows[2:]))
    return found


def numbers_in(cell: str) -> list[str]:
    """The figures of a cell. Code, links, and numbers that are part of a name are none."""
    cell = re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>", " ", cell)
    words = re.split(r"[\s±/\[\]()]+|(?<=\d)\s*(?:-|–|to)\s*(?=\d)", cell)
    words = [word.strip("*_~%x×,;:.<>=") for word in words]
    return [word for word in words if re.fullmatch(r"[+-]?\d[\d,]*(?:\.\d+)?", word)]


def numbers_of_json(value) -> list[float]:
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in numbers_of_json(part)]
    return [float(value)] if type(value) in (int, float) else []


def shown_as(figure: str, values: list[float]) -> bool:
    """Is one of the values this figure, at the precision the figure has?"""
    digits = figure.lstrip("+").replace(",", "")
    places = len(digits.partition(".")[2])
    return any(f"{x:.{places}f}" == digits or f"{100 * x:.{places}f}" == digits for x in values)


def unfounded_figures(text: str) -> list[str]:
    """Numbers of a table that its file of results does not hold; numbers without such a file."""
    faults = []
    for table in tables(text):
        kind, _, source = table.mark.partition(": ")
        numbers = [n for row in table.rows for cell in row for n in numbers_in(cell)]
        if kind == "figures":
            values = numbers_of_json(
                [json.loads((PROJECT / f).read_text()) for f in source.split()]
            )
            faults += [f"{n} is not in {source}" for n in numbers if not shown_as(n, values)]
        cells = [cell.strip("*") for row in table.rows for cell in row]
        if kind not in ("figures", "computed") and set(cells) & set(numbers):
            faults.append(f"{table.header}: numbers without a file of results")
    return faults
