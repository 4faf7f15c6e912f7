"""What README, CONTRIBUTING, docs/, benchmarks/*.md and train.sh name exists, and what they show
comes out.

A comment on the line before a table says where its numbers come from:

    <!-- figures: benchmarks/NAME.json -->   they stand in that file
    <!-- computed: tests/x.py::test_y -->    that test computes them again
"""

import doctest
import json
import os
import re
from functools import cache
from pathlib import Path

import pytest
from conftest import PROJECT
from doc_checks import FENCE, prose, tables

ROOMS = ("", "kernels", "model", "run", "tools", "benchmarks", "tests")
CODE = sorted(path for room in ROOMS for path in (PROJECT / room).glob("*.py"))
DOCUMENTS = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "train.sh")]
DOCUMENTS += sorted([*PROJECT.glob("docs/*.md"), *PROJECT.glob("benchmarks/*.md")])
EQUATIONS = (PROJECT / "docs" / "equations.md").read_text(encoding="utf-8")
OFFICIAL_LINES = json.loads((PROJECT / "tests/golden/official_lines.json").read_text())
OFFICIAL = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|md|json)):(\d+(?:-\d+)?)`")
# What documents name that is the official repository's, not ours.
NOT_OURS = {line.partition(":")[0] for line in OFFICIAL_LINES} | set(
    "grpo_config.py eval_general_videor1.py eval_clevrer_zeroshot.py use_epsilon "
    "use_dynamic_sampling ori_accuracy".split()
)

FILES = ("json", "html", "png")  # endings of what a run leaves

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(PROJECT)))


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def defines(path: Path, name: str) -> bool:
    """Whether a module defines it: a function, a class, a method, a field, a constant."""
    pattern = rf"^ *(?:(?:def|class) {name}\b|(?:self\.)?{name}(?:, \w+)*(?:: [^=\n]+)?(?: =|$))"
    return bool(re.search(pattern, text_of(path), re.MULTILINE))


def anchors(text: str) -> set[str]:
    """The anchors GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


# ---------------------------------------------------------------------------------- what they name


@documents
def test_every_flag_is_known_to_some_program(path):
    known = {"standalone", "nproc_per_node", "help"}  # torchrun's, argparse's
    known |= set(re.findall(r"^    (\w+): ", text_of(PROJECT / "run/config.py"), re.MULTILINE))
    known |= {flag for file in CODE for flag in re.findall(r'"--([a-z_]+)"', text_of(file))}
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z_]+)", text_of(path))) <= known


@documents
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text_of(path))):
        file, _, anchor = target.partition("#")
        if not target.startswith("http"):
            goal = (path.parent / file).resolve() if file else path
            assert goal.exists(), target
            assert not anchor or anchor in anchors(text_of(goal)), target


@documents
def test_every_name_in_code_type_exists(path):
    """[`name`](file.py) is in that file, `module.name` in that module, a path in the tree; any
    other word with an underscore stands somewhere in the code."""
    for name, target in re.findall(r"\[`([\w.]+)`\]\(([^)#\s]+\.py)\)", prose(text_of(path))):
        file = (path.parent / target).resolve()
        assert name == file.name or defines(file, name.split(".")[-1]), (name, target)
    modules = {file.stem: file for file in CODE if file.parent.name != "tests"}
    for span in set(re.findall(r"`([^`\n]+)`", prose(text_of(path)))) - NOT_OURS:
        span = re.sub(r"\(.*\)$", "", span).split("::")[0]
        top, module, name = span.partition("/")[0], span.partition(".")[0], span.split(".")[-1]
        if re.fullmatch(r"\w+\.(py|sh)|(\w+/)+[\w.-]*", span):
            assert (PROJECT / span).exists() or not (PROJECT / top).is_dir(), span
        elif re.fullmatch(r"(\w+\.)+\w+", span) and module in modules and name not in FILES:
            assert name in modules or defines(modules[module], name), span
        elif re.fullmatch(r"[A-Za-z]\w*_\w+", span):
            assert any(re.search(rf"\b{span}\b", text_of(file)) for file in CODE), span


@pytest.mark.parametrize("path", [*DOCUMENTS, *CODE], ids=lambda path: path.name)
def test_every_test_and_equation_referred_to_exists(path):
    for file, name in re.findall(r"(tests/test_\w+\.py)(?:::(\w+))?", text_of(path)):
        assert not name or f"def {name}(" in text_of(PROJECT / file), f"{file}::{name}"
    for word in re.findall(r"pytest[^\n`]*? -k (\w+)", text_of(path)):
        assert any(re.search(rf"def test_\w*{word}", text_of(file)) for file in CODE), word
    known = set(re.findall(r"\\tag\{(\d+)\}", EQUATIONS))
    pattern = r"\b[Ee]qs?\. (\d+(?:(?:, | and | to |-)\d+)*)"
    for numbers in re.findall(pattern, text_of(path)):
        assert set(re.findall(r"\d+", numbers)) <= known, numbers


def test_every_equation_has_a_function_a_kernel_line_a_test_and_notes():
    sections = re.split(r"^### Eq\. (\d+): .*$", EQUATIONS, flags=re.MULTILINE)
    assert [int(n) for n in sections[1::2]] == list(range(1, len(sections) // 2 + 1))
    for n, body in zip(sections[1::2], sections[2::2], strict=True):
        assert re.findall(r"\\tag\{(\d+)\}", body.split("\n## ")[0]) == [n]
        for line in ("function: .*", "kernel: ", "test: .*tests/test_", "implementation notes: "):
            assert re.search(f"^- {line}", body, re.MULTILINE), (n, line)


def test_math_is_what_github_can_show():
    formulas = [body for language, body in FENCE.findall(EQUATIONS) if language == "math"]
    for formula in formulas + re.findall(r"\$([^$\n]+)\$", prose(EQUATIONS)):
        braces = re.sub(r"\\[{}]", "", formula)
        assert braces.count("{") == braces.count("}"), formula
        assert r"\operatorname" not in formula, formula  # GitHub forbids it


def test_official_lines_hold_what_is_said_of_them():
    """With TWGRPO_OFFICIAL, a checkout of the official repository at aa529ff, they are read."""
    cited = {":".join(found) for path in DOCUMENTS for found in OFFICIAL.findall(text_of(path))}
    assert cited == set(OFFICIAL_LINES)
    checkout = os.environ.get("TWGRPO_OFFICIAL")
    for line, word in OFFICIAL_LINES.items() if checkout else ():
        name, _, numbers = line.partition(":")
        first, _, last = numbers.partition("-")
        file = Path(checkout) / name
        file = file if file.exists() else next(Path(checkout).rglob(name))
        lines = file.read_text(encoding="utf-8").splitlines()
        assert word in "\n".join(lines[int(first) - 1 : int(last or first)]), line


# --------------------------------------------------------------------------------- what they show


def test_code_quoted_after_a_link_stands_in_that_file():
    """Comments, quoted as `# ...`, and in block quotes all code."""
    for path in PROJECT.glob("docs/*.md"):
        quotes = " ".join(re.findall("^> (.*)$", text_of(path), re.MULTILINE))
        quoted = re.findall(r"\[`[^`]+`\]\((\S+\.py)\)|`([^`]+)`", quotes)
        quoted += re.findall(r"\]\(([^)#\s]+\.py)\)|`(# [^`\n]+)`", prose(text_of(path)))
        file = path
        for link, code in quoted:
            file = (path.parent / link).resolve() if link else file
            assert code in " ".join(text_of(file).split()), f"{file} does not hold {code}"


def numbers_in(text: str) -> list[str]:
    """The figures of a text. Code, links, and numbers that are part of a name are none."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>", " ", text)
    words = re.split(r"[\s±/\[\]()]+|(?<=\d)\s*(?:-|–|to)\s*(?=\d)", text)
    words = [word.strip("*_~%x×,;:.<>=") for word in words]
    return [word for word in words if re.fullmatch(r"[+-]?\d[\d,]*(?:\.\d+)?", word)]


def shows(number: str, value: float) -> bool:
    """Is the number this value, at the precision the number has?"""
    digits = number.lstrip("+").replace(",", "")
    return f"{value:z.{len(digits.partition('.')[2])}f}" == digits


def numbers_of_json(value) -> list[float]:
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in numbers_of_json(part)]
    return [float(value)] if type(value) in (int, float) else []


@documents
def test_every_figure_in_a_table_is_in_a_file_of_results(path):
    """A table with a cell that is a number names its file of results, or a test that computes it;
    each of its numbers stands in the file, as it is or as a share."""
    for table in tables(text_of(path)):
        kind, _, source = table.mark.partition(": ")
        cells = [cell for row in table.rows for cell in row]
        numbers = [number for cell in cells for number in numbers_in(cell)]
        if kind != "figures":
            bare = {cell.strip("*") for cell in cells} & set(numbers)
            assert kind == "computed" or not bare, table.header
            continue
        values = numbers_of_json([json.loads(text_of(PROJECT / f)) for f in source.split()])
        for number in numbers:
            assert any(shows(number, x) or shows(number, 100 * x) for x in values), number


@pytest.mark.parametrize("name", ["equations.md", "walkthrough.md"])
def test_the_code_of_a_page_prints_what_it_shows(name, monkeypatch):
    import torch

    monkeypatch.chdir(PROJECT)
    text = re.sub(r"^```.*$", "", text_of(PROJECT / "docs" / name), flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    try:
        assert doctest.DocTestRunner().run(test).failed == 0
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_printoptions(profile="default")


def test_each_number_in_the_text_of_the_walkthrough_stands_in_its_code():
    page = text_of(PROJECT / "docs" / "walkthrough.md")
    code = " ".join(body for _, body in FENCE.findall(page))
    values = [float(x.replace(",", "")) for x in re.findall(r"-?\d[\d,]*\.?\d*\b", code)]
    text = re.sub(r"^>.*$|eqs?\. [\d, to and]+", "", prose(page), flags=re.MULTILINE)
    for number in numbers_in(text):
        assert any(shows(number, x) for x in values), number
