"""Checks of what the documents say against what is there. Each returns a list of sentences, one a
fault; an empty list is a pass. `test_docs.py` feeds them the documents, and lies to be caught.

Marks a document may carry, each an HTML comment on its own line, right before what it is about:

    <!-- figures: benchmarks/NAME.json -->   the numbers of the next table stand in that file
    <!-- computed: tests/x.py::test_y -->    the numbers of the next table are recomputed there
    <!-- run -->                             the next block of bash or python runs as it is
"""

import ast
import json
import os
import re
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from _pytest.mark.expression import Expression

PROJECT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "train.sh", "docs/*.md", "benchmarks/*.md"]


def documents() -> list[Path]:
    return sorted(path for pattern in DOCUMENTS for path in PROJECT.glob(pattern))


def relative(path: Path) -> str:
    return str(path.relative_to(PROJECT))


# ------------------------------------------------------------------------------------ what there is


@cache
def python_files() -> tuple[Path, ...]:
    folders = ("", "kernels", "model", "run", "tools", "benchmarks", "tests")
    return tuple(path for folder in folders for path in sorted((PROJECT / folder).glob("*.py")))


@cache
def names_in(path: Path) -> frozenset[str]:
    """Every name a module defines, methods and fields as Class.name, arguments left out."""
    found: set[str] = set()

    def visit(body, prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + node.name)
            elif isinstance(node, ast.ClassDef):
                found.add(prefix + node.name)
                visit(node.body, f"{prefix}{node.name}.")
                for child in ast.walk(node):  # self.x = ..., in any method
                    if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                        if isinstance(child.value, ast.Name) and child.value.id == "self":
                            found.add(f"{prefix}{node.name}.{child.attr}")
            elif isinstance(node, ast.Assign):
                found.update(prefix + x.id for target in node.targets for x in ast.walk(target)
                             if isinstance(x, ast.Name))  # fmt: skip
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)
            elif isinstance(node, ast.If | ast.Try | ast.With):
                visit(node.body, prefix)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Names a module has from others: attributes of it, but defined elsewhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [n for n in tree.body if isinstance(n, ast.ImportFrom | ast.Import)]
    return frozenset(alias.asname or alias.name for n in nodes for alias in n.names)


@cache
def words_of_the_code() -> frozenset[str]:
    """Every identifier that stands anywhere in the project's Python, comments and strings too."""
    text = "\n".join(p.read_text(encoding="utf-8") for p in python_files()
                     if p.name not in ("test_docs.py", "doc_checks.py"))  # fmt: skip
    return frozenset(re.findall(r"[A-Za-z_]\w*", text))


def homes_of(name: str) -> list[str]:
    return [relative(p) for p in python_files() if name in names_in(p)]


@cache
def flags_of(program: str) -> frozenset[str]:
    """The flags one program knows: those of its parsers, and the fields of Config."""
    source = (PROJECT / program).read_text(encoding="utf-8")
    flags = set(re.findall(r"""["']--([a-z_]+)["']""", source)) | {"help"}
    if program == "twgrpo.py":
        module = next(p for p in map(PROJECT.joinpath, homes_of("Config")))
        flags |= {n.removeprefix("Config.") for n in names_in(module) if n.startswith("Config.")}
    return frozenset(flags)


TORCHRUN = {"standalone", "nproc_per_node"}


def all_flags() -> frozenset[str]:
    programs = [relative(p) for p in python_files() if not relative(p).startswith("tests/")]
    return frozenset().union(TORCHRUN, *map(flags_of, programs))


@cache
def tests_of(file: str) -> frozenset[str]:
    path = PROJECT / file
    return frozenset(n for n in names_in(path) if n.startswith("test_")) if path.exists() else ()


# ------------------------------------------------------------------------------- parts of documents


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str, bool]]:
    """(language, body, marked to run) of every fenced block."""
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()].rstrip("\n").rsplit("\n", 1)[-1]
        found.append((match[1], match[2], before.strip() == "<!-- run -->"))
    return found


def prose(text: str) -> str:
    """The document without its fenced blocks."""
    return FENCE.sub("", text)


def slug(heading: str) -> str:
    """The anchor GitHub gives a heading."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


def anchors(text: str) -> set[str]:
    seen: dict[str, int] = {}
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        name = slug(heading)
        found.add(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return found


@dataclass
class Table:
    mark: str  # the comment right before it, or ""
    header: list[str]
    rows: list[list[str]]


def tables(text: str) -> list[Table]:
    lines, found, k = prose(text).splitlines(), [], 0
    while k < len(lines) - 1:
        if lines[k].startswith("|") and re.fullmatch(r"\|[\s:|-]+\|", lines[k + 1].strip()):
            end = k
            while end < len(lines) and lines[end].startswith("|"):
                end += 1
            before = next((x for x in reversed(lines[:k]) if x.strip()), "")
            mark = re.fullmatch(r"<!--\s*(.*?)\s*-->", before.strip())
            cells = [[c.strip() for c in re.split(r"(?<!\\)\|", x.strip()[1:-1])]
                     for x in lines[k:end]]  # fmt: skip
            found.append(Table(mark[1] if mark else "", cells[0], cells[2:]))
            k = end
        k += 1
    return found


def spans(text: str) -> list[str]:
    """The backticked parts outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


# -------------------------------------------------------------------------------------------- flags


PROGRAM = re.compile(r"(?<![\w/])((?:\w+/)*\w+\.py)\b|-m ((?:kernels|tools|benchmarks)\.\w+)")


def wrong_flags(text: str, not_ours: frozenset[str] = frozenset()) -> list[str]:
    """Flags no parser knows, and flags given to a program that does not know them."""
    faults = []
    known = all_flags() | not_ours
    for flag in sorted(set(re.findall(r"(?<![\w-])--([a-z][a-z_]+)", text)) - known):
        faults.append(f"--{flag}: no parser knows it (not ours? FLAGS_NOT_OURS)")
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        line = line.split(" # ")[0]
        program = PROGRAM.search(line)
        if not program or "pytest" in line or not re.search(r"\b(?:python|torchrun)\b", line):
            continue
        file = program[1] or program[2].replace(".", "/") + ".py"
        given = re.findall(r"(?<![\w-])--([a-z][a-z_]+)", line[program.end() :])
        if (PROJECT / file).exists():
            faults += [f"{file} has no flag --{f}" for f in given if f not in flags_of(file)]
        else:
            faults.append(f"{file}: no such program")
    return faults


# ------------------------------------------------------------------------------ links, paths, names


def broken_links(text: str, folder: Path) -> list[str]:
    faults = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (folder / file).resolve() if file else None
        if path and not path.exists():
            faults.append(f"link to {target}: no such file")
        elif anchor and anchor not in anchors(path.read_text("utf-8") if path else text):
            faults.append(f"link to {target}: no such heading")
    return faults


def committed(path: str) -> bool:
    """Is this a file or folder of the project, as a clone would have it? `*` as in a shell."""
    return any(fnmatch(f, path) or fnmatch(f, f"{path}/*") for f in tracked_files())


def missing_references(text: str) -> list[str]:
    """docs/x.md, kernels/x.py and the like, wherever they stand in code."""
    named = re.findall(r"(?<![\w/.])(?:docs|kernels|tests)/[\w/]+\.(?:py|md|png|json)\b", text)
    return [f"{path}: no such file" for path in sorted(set(named)) if not committed(path)]


PATH = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|md|sh|json|jsonl|png|html|txt|toml)|(?:[\w.-]+/)+")


def missing_paths(text: str, folder: Path, run: Path, not_ours: frozenset[str]) -> list[str]:
    """Backticked paths that are neither here nor, as a run's output, in a finished run."""
    faults = []
    for span in spans(text):
        path = span.split("::")[0]
        if not PATH.fullmatch(path) or path in not_ours:
            continue
        path = path.rstrip("/").replace("checkpoint-N", "checkpoint-*")
        here = os.path.normpath(os.path.relpath(folder, PROJECT) + "/" + path)
        if committed(path) or committed(here):
            continue
        if not any(any(base.glob(path)) for base in (run, run.parent.parent)):  # x, or runs/toy/x
            faults.append(f"`{span}`: no such file (not ours? PATHS_NOT_OURS)")
    return faults


def wrong_names(text: str, folder: Path, not_ours: frozenset[str] = frozenset()) -> list[str]:
    """[`name`](file.py) where the file does not define it; `module.name` likewise; and words with
    an underscore that stand nowhere in the code."""
    faults = []
    for name, target in re.findall(r"\[`([\w.]+)`\]\(([^)#\s]+\.py)\)", prose(text)):
        path = (folder / target).resolve()
        if path.exists() and name not in names_in(path) and name != path.name:
            homes = homes_of(name)
            where = f"; it is in {', '.join(homes)}" if homes else ", nor does any other"
            faults.append(f"`{name}`: {target} does not define it{where}")
    modules = {p.stem: p for p in python_files() if not relative(p).startswith("tests/")}
    modules["kernels"] = PROJECT / "kernels/__init__.py"
    for span in spans(text):
        span = re.sub(r"\(.*\)$", "", span)
        if span in not_ours or not re.fullmatch(r"[A-Za-z_][\w.]*", span) or PATH.fullmatch(span):
            continue
        first, _, rest = span.partition(".")
        if rest and first in modules:
            module = modules[first]
            if rest not in names_in(module) | imports_of(module) | modules.keys():
                faults.append(f"`{span}`: {relative(modules[first])} does not define {rest}")
        elif rest:
            classes = [p for p in python_files() if first in names_in(p)]
            if classes and not any(span in names_in(p) for p in classes):
                faults.append(f"`{span}`: {first} has no {rest}")
        elif "_" in span.strip("_") and span not in words_of_the_code():
            faults.append(f"`{span}`: stands nowhere in the code (not ours? NAMES_NOT_OURS)")
    return faults


# -------------------------------------------------------------------------------------------- tests


def missing_tests(text: str) -> list[str]:
    faults = []
    for file, name in re.findall(r"(tests/\w+\.py)(?:::(\w+))?", text):
        if not (PROJECT / file).exists():
            faults.append(f"{file}: no such file")
        elif name and name not in tests_of(file):
            homes = [h for h in homes_of(name) if h.startswith("tests/")]
            faults.append(f"{file} has no {name}" + (f"; {', '.join(homes)} has" if homes else ""))
    files = [relative(p) for p in python_files() if p.name.startswith("test_")]
    for quoted, plain in re.findall(r"""pytest[^\n`]*?\s-k\s+(?:["']([^"']+)["']|(\S+))""", text):
        expression = Expression.compile(quoted or plain)
        if not any(
            expression.evaluate(lambda word, _f=f, _t=t, **_: word.lower() in f"{_f} {_t}".lower())
            for f in files
            for t in tests_of(f)
        ):
            faults.append(f"-k {quoted or plain!r} selects no test")
    return faults


# ---------------------------------------------------------------------------------------- equations


def tags(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\\tag\{(\d+)\}", text)]


def equation_faults(text: str) -> list[str]:
    """Every section "### Eq. n: ..." has \\tag{n}, a function and a test; every tag is in one."""
    faults = []
    numbers = tags(text)
    if numbers != list(range(1, len(numbers) + 1)):
        faults.append(f"tags are {numbers}, not 1, 2, 3, ...")
    sections = re.split(r"^### Eq\. (\d+): .*$", text, flags=re.MULTILINE)
    found = {int(n): body.split("\n## ")[0] for n, body in zip(sections[1::2], sections[2::2],
                                                                strict=True)}  # fmt: skip
    for n in sorted(set(numbers) | set(found)):
        body = found.get(n, "")
        if tags(body) != [n]:
            faults.append(f"eq. {n}: its section holds the tags {tags(body)}")
        lines = {kind: re.search(rf"^- {kind}: (.+?)(?=^- |\Z)", body, re.MULTILINE | re.DOTALL)
                 for kind in ("function", "kernel", "test", "unsaid")}  # fmt: skip
        for kind, line in lines.items():
            if not line:
                faults.append(f"eq. {n}: no line '- {kind}: ...'")
        if lines["function"] and not re.search(r"\[`[\w.]+`\]\([^)]+\.py\)", lines["function"][1]):
            faults.append(f"eq. {n}: no function is linked")
        if lines["test"] and not re.search(r"tests/\w+\.py::test_\w+", lines["test"][1]):
            faults.append(f"eq. {n}: no test is named")
    return faults


def broken_math(text: str) -> list[str]:
    """Math that GitHub would show as its source: braces or environments that do not pair, or a
    macro it forbids."""
    faults = []
    shown = re.findall(r"^```math\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"(?<![\w\\$])\$([^$\n]+)\$(?!\w)", prose(text))
    for math in shown + inline:
        braces = re.sub(r"\\[{}]", "", math)
        pairs = [("{", "}"), (r"\begin{cases}", r"\end{cases}")]
        if any(braces.count(a) != braces.count(b) for a, b in pairs):
            faults.append(f"unpaired: {math.strip()[:60]}")
        faults += [f"GitHub forbids {m}" for m in re.findall(r"\\operatorname", math)]
    return faults


def misquoted_comments(text: str, folder: Path) -> list[str]:
    """`# ...` quoted after a link to a Python file must be a comment of that file."""
    faults, target = [], None
    for match in re.finditer(r"\]\(([^)#\s]+\.py)\)|`(# [^`\n]+)`", prose(text)):
        if match[1]:
            target = (folder / match[1]).resolve()
        elif target is None or match[2] not in target.read_text(encoding="utf-8"):
            faults.append(f"`{match[2]}` is no comment of {target and relative(target)}")
    return faults


def dangling_equations(text: str, known: set[int]) -> list[str]:
    """ "eq. 7", "eqs. 7 and 9", "eqs. 7-9" where docs/equations.md has no such tag."""
    faults = []
    for listed in re.findall(r"\b[Ee]qs?\.\s*\(?(\d+(?:(?:\s*(?:,|and|to|-)\s*)\d+)*)", text):
        faults += [f"eq. {n}: no such equation" for n in re.findall(r"\d+", listed)
                   if int(n) not in known]  # fmt: skip
    return faults


# ------------------------------------------------------------------------------------------ figures


def numbers_in(cell: str) -> list[str]:
    """The figures of a cell: words that are a number, whatever stands around it. Code, links, and
    numbers that are part of a name (Qwen2.5-VL-7B) are none."""
    cell = re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>", " ", cell).replace("−", "-")
    words = re.split(r"[\s±/\[\]()]+|(?<=\d)\s*(?:-|–|to)\s*(?=\d)", cell)
    words = [w.strip("*_~%x×,;:.<>=") for w in words if w]
    return [w for w in words if re.fullmatch(r"[+-]?\d[\d,]*(?:\.\d+)?", w)]


def is_measured(table: Table) -> bool:
    """A cell that is nothing but a number makes a table one of measurements."""
    return any(re.fullmatch(r"[*_~+−-]*\d[\d,]*(\.\d+)?\s*[%x×*_s]*", c)
               for row in table.rows for c in row)  # fmt: skip


def numbers_of_json(value) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers_of_json(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers_of_json(v)]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    return [float(value)]


def shown_as(figure: str, values: list[float]) -> bool:
    """Is one of the values this figure, at the precision the figure shows?"""
    digits = figure.lstrip("+").replace(",", "")
    places = len(digits.partition(".")[2])
    return any(f"{x:.{places}f}" == digits or f"{100 * x:.{places}f}" == digits for x in values)


def unfounded_figures(text: str) -> list[str]:
    """Numbers of a table that its file of results does not hold; tables of numbers without one."""
    faults = []
    for table in tables(text):
        title = f"table '{' | '.join(table.header)[:60]}'"
        kind, _, source = table.mark.partition(": ")
        if kind == "figures":
            values = []
            for file in source.split():
                if not committed(file):
                    faults.append(f"{title}: {file}: no such file, or one git ignores")
                else:
                    values += numbers_of_json(json.loads((PROJECT / file).read_text("utf-8")))
            for row in table.rows:
                for figure in (n for cell in row for n in numbers_in(cell)):
                    if values and not shown_as(figure, values):
                        faults.append(f"{title}: {figure} is not in {source}")
        elif kind == "computed":
            faults += [f"{title}: {fault}" for fault in missing_tests(source)]
            if not re.fullmatch(r"tests/\w+\.py::test_\w+", source):
                faults.append(f"{title}: 'computed' names no test")
        elif is_measured(table):
            faults.append(f"{title}: numbers without <!-- figures: FILE.json --> before it")
    return faults


# ----------------------------------------------------------------------------------- official lines


OFFICIAL = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|md|json)):(\d+)(?:-(\d+))?`")


def official_references(text: str) -> list[tuple[str, int, int]]:
    """`path:line` or `path:first-last` of the official repository."""
    return [(path, int(a), int(b or a)) for path, a, b in OFFICIAL.findall(text)]


def official_faults(text: str, words: dict[str, str], checkout: Path | None) -> list[str]:
    """Every cited line has a word that tells it, and, with a checkout at hand, holds that word."""
    faults = []
    for path, first, last in official_references(text):
        key = f"{path}:{first}" + (f"-{last}" if last != first else "")
        if key not in words:
            faults.append(f"{key}: tests/golden/official_lines.json does not know it")
        elif checkout:
            file = checkout / path  # or, by its name alone, wherever it is
            file = file if file.exists() else next(checkout.rglob(path))
            lines = file.read_text(encoding="utf-8").splitlines()
            if words[key] not in "\n".join(lines[first - 1 : last]):
                faults.append(f"{key}: does not hold {words[key]!r}")
    return faults


# ------------------------------------------------------------------------------------- running them


@cache
def tracked_files() -> tuple[str, ...]:
    """What git knows of the project, or, without git, every file but caches and runs."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode == 0:
        return tuple(f for f in listed.stdout.splitlines() if (PROJECT / f).is_file())
    skipped = {"runs", ".git", "__pycache__", ".venv", "venv"}
    return tuple(
        relative(p)
        for p in PROJECT.rglob("*")
        if p.is_file() and not skipped & set(p.relative_to(PROJECT).parts)
    )
