"""Parts of the Markdown documents."""

import re
from dataclasses import dataclass

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Table:
    mark: str  # the comment on the line before it, or ""
    header: list[str]
    rows: list[list[str]]


def prose(text: str) -> str:
    """The document without its fenced blocks."""
    return FENCE.sub("", text)


def tables(text: str) -> list[Table]:
    found = []
    pattern = r"(?:^<!--\s*(.*?)\s*-->\n+)?((?:^\|.*\n)+)"
    for mark, lines in re.findall(pattern, prose(text) + "\n", re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in lines.splitlines()]
        rows = [[cell.strip() for cell in row] for row in rows]
        found.append(Table(mark, rows[0], rows[2:]))
    return found
