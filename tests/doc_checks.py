"""Parts of the Markdown documents, and the numbers in their tables.

A comment on the line before a table says where its numbers come from:

    <!-- figures: benchmarks/NAME.json -->   they stand in that file
    <!-- computed: tests/x.py::test_y -->    that test computes them again
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from conftest import PROJECT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "train.sh")]
DOCUMENTS += sorted([*PROJECT.glob("docs/*.md"), *PROJECT.glob("benchmarks/*.md")])


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


def shows(cell: str, value: float) -> bool:
    """Is the cell this value, at the precision the cell has?"""
    digits = cell.lstrip("+").replace(",", "")
    return f"{value:z.{len(digits.partition('.')[2])}f}" == digits


def all_shown(cells: Iterable[str], values: Iterable[float]) -> bool:
    """Do the cells show these values, in this order?"""
    return all(shows(cell, float(x)) for cell, x in zip(cells, values, strict=True))
