"""What README.md, docs/, benchmarks/*.md and train.sh say exists, exists, and what they show runs.

The checks are in `doc_checks.py`, and say there how a document marks its tables and blocks. Each is
also given a lie here, to see it fail.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import doc_checks as checks
import pytest
from conftest import PROJECT, TOY_FLAGS, run_twgrpo

README = (PROJECT / "README.md").read_text(encoding="utf-8")
EQUATIONS = (PROJECT / "docs" / "equations.md").read_text(encoding="utf-8")
DOCUMENTS = checks.documents()
documents = pytest.mark.parametrize("path", DOCUMENTS, ids=checks.relative)

# What documents name that is not ours: flags,
FLAGS_NOT_OURS = frozenset()
# files of the official repository and of datasets,
PATHS_NOT_OURS = frozenset(
    "grpo.py model_card.md grpo_trainer.py grpo_config.py vision_process.py eval_clevrer.py "
    "eval_clevrer_zeroshot.py eval_general_zeroshot.py eval_general_videor1.py convert_nextgqa.py "
    "convert_star.py tw-grpo.sh grpo.sh eval_nextgqa.json eval_mvbench.json eval_tempcompass.json "
    "eval_videomme.json".split()
)
# and names of the official code.
NAMES_NOT_OURS = frozenset("use_epsilon use_dynamic_sampling ori_accuracy".split())


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def no_faults(faults: list[str], path: Path | None = None) -> None:
    assert not faults, "\n".join([f"{path and checks.relative(path)}:", *faults])


# ---------------------------------------------------------------------- documents against the code


@documents
def test_every_flag_named_is_one_of_the_program_it_is_given_to(path):
    no_faults(checks.wrong_flags(text_of(path), FLAGS_NOT_OURS), path)


@documents
def test_every_link_leads_somewhere(path):
    no_faults(checks.broken_links(text_of(path), path.parent), path)


@documents
def test_every_function_and_attribute_named_exists(path):
    no_faults(checks.wrong_names(text_of(path), path.parent, NAMES_NOT_OURS), path)


@documents
def test_every_test_named_exists(path):
    no_faults(checks.missing_tests(text_of(path)), path)


@documents
def test_every_figure_in_a_table_is_in_a_file_of_results(path):
    no_faults(checks.unfounded_figures(text_of(path)), path)


@documents
def test_every_equation_referred_to_exists(path):
    no_faults(checks.dangling_equations(text_of(path), set(checks.tags(EQUATIONS))), path)


@pytest.mark.parametrize("path", checks.python_files(), ids=checks.relative)
def test_equations_tests_and_files_that_code_refers_to_exist(path):
    if path.name in ("test_docs.py", "doc_checks.py"):
        return  # full of lies
    no_faults(checks.dangling_equations(text_of(path), set(checks.tags(EQUATIONS))), path)
    no_faults(checks.missing_tests(text_of(path)), path)
    no_faults(checks.missing_references(text_of(path)), path)


@documents
def test_math_is_what_github_can_show(path):
    no_faults(checks.broken_math(text_of(path)), path)


def test_every_equation_has_a_function_a_kernel_line_a_test_and_what_it_leaves_unsaid():
    no_faults(checks.equation_faults(EQUATIONS))
    assert len(checks.tags(EQUATIONS)) >= 25


@documents
def test_every_comment_quoted_from_a_kernel_is_there(path):
    no_faults(checks.misquoted_comments(text_of(path), path.parent), path)


@documents
def test_nothing_is_left_to_fill_in(path):
    assert not re.search(r"\b(TABLE|TODO|FIXME|XXX)\b", text_of(path))


@documents
def test_official_lines_hold_what_is_said_of_them(path):
    """With TWGRPO_OFFICIAL, a checkout of the official repository at aa529ff, they are read."""
    words = json.loads((PROJECT / "tests/golden/official_lines.json").read_text("utf-8"))
    checkout = Path(os.environ["TWGRPO_OFFICIAL"]) if "TWGRPO_OFFICIAL" in os.environ else None
    no_faults(checks.official_faults(text_of(path), words, checkout), path)


def test_no_exception_outlives_what_it_excepts():
    """The lists above, and the official lines, hold what some document says and nothing else."""
    text = "\n".join(map(text_of, DOCUMENTS))
    named = {*FLAGS_NOT_OURS, *PATHS_NOT_OURS, *NAMES_NOT_OURS}
    assert not [name for name in sorted(named) if name not in text]
    words = json.loads((PROJECT / "tests/golden/official_lines.json").read_text("utf-8"))
    assert not [line for line in words if f"`{line}`" not in text]


# ------------------------------------------------------------------------- documents against a run


@pytest.fixture(scope="module")
def checkout(world, tmp_path_factory) -> Path:
    """A copy of the project's files with a small finished run of the toy at runs/toy."""
    root = tmp_path_factory.mktemp("copy") / "twgrpo"
    for file in checks.tracked_files():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PROJECT / file, root / file)
    result = run_twgrpo(
        world, root / "runs/toy", *TOY_FLAGS, "--eval_jsonl_path", str(world / "test.jsonl")
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shutil.copytree(world, root / "runs/toy/toy")
    return root


@documents
def test_every_path_named_exists_here_or_in_a_finished_run(path, checkout):
    run = checkout / "runs/toy"
    no_faults(checks.missing_paths(text_of(path), path.parent, run, PATHS_NOT_OURS), path)


def marked_to_run() -> list:
    found = []
    for path in DOCUMENTS:
        marked = [(kind, body) for kind, body, run in checks.blocks(text_of(path)) if run]
        found += [
            pytest.param(kind, body, id=f"{checks.relative(path)}-{k}")
            for k, (kind, body) in enumerate(marked, 1)
        ]
    return found


@pytest.mark.parametrize("kind, body", marked_to_run())
def test_code_marked_to_run_runs(kind, body, checkout):
    no_faults(run_block(kind, body, checkout))


def run_block(kind: str, body: str, folder: Path) -> list[str]:
    """Runs a block as a reader would, on the CPU; a sentence if it fails."""
    if kind not in ("bash", "python"):
        return [f"a block of {kind or 'no language'} is marked to run; bash and python can be"]
    beside = str(Path(sys.executable).parent)  # `python` in the block is this one
    shell = [sys.executable, "-c"] if kind == "python" else ["bash", "-euo", "pipefail", "-c"]
    result = subprocess.run(
        [*shell, body],
        cwd=folder, capture_output=True, text=True, timeout=120,
        env=dict(os.environ, TQDM_DISABLE="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(folder),
                 PATH=beside + os.pathsep + os.environ["PATH"]),
    )  # fmt: skip
    return [f"{body}\nended with {result.returncode}: {result.stderr[-2000:]}"] * bool(
        result.returncode
    )


def test_the_metric_table_names_every_metric_and_no_other(checkout):
    """Where README explains metrics in a table: first column, names in backticks."""
    row = json.loads((checkout / "runs/toy/metrics.jsonl").read_text().splitlines()[-1])
    (table,) = [
        t
        for path in DOCUMENTS
        for t in checks.tables(text_of(path))
        if any("`loss`" in r[0] for r in t.rows)
    ]
    named = {name for r in table.rows for name in re.findall(r"`([a-z0-9_/]+)`", r[0])}
    assert named == set(row) - {"step"}


# ------------------------------------------------------------------------ the checks catch a lie


HERE = PROJECT / "docs"


def table(mark: str, cell: str) -> str:
    return f"{mark}\n| a | b |\n|---|---|\n| x | {cell} |\n"


CAUGHT = {
    "a flag no parser knows": lambda: checks.wrong_flags("use `--alpa 2`"),
    "a flag of another program": lambda: checks.wrong_flags("python -m tools.curves X --alpha 2"),
    "a flag of another module": lambda: checks.wrong_flags("python -m benchmarks.step --alpha 1"),
    "a program that is not there": lambda: checks.wrong_flags("python trane.py --alpha 2"),
    "a flag behind a line break": lambda: checks.wrong_flags(
        "python -m tools.curves \\\n  --alpha 1"
    ),
    "a link to no file": lambda: checks.broken_links("[x](../rewadrs.py)", HERE),
    "a link to no heading": lambda: checks.broken_links("[x](equations.md#eq-99-none)", HERE),
    "a link to no heading here": lambda: checks.broken_links("# Title\n[x](#titel)", HERE),
    "a path that is not there": lambda: checks.missing_paths(
        "`kernels/refrence.py`", HERE, HERE, frozenset()
    ),
    "an output no run writes": lambda: checks.missing_paths(
        "`metrics.json`", HERE, HERE, frozenset()
    ),
    "a folder that is not there": lambda: checks.missing_paths(
        "`kernel/`", HERE, HERE, frozenset()
    ),
    "a function that is only imported": lambda: checks.wrong_names(
        "[`Policy`](../twgrpo.py)", HERE
    ),
    "a function that moved": lambda: checks.wrong_names("[`tw_grpo`](../rewards.py)", HERE),
    "a method that is not there": lambda: checks.wrong_names(
        "[`Policy.prefil`](../model/policy.py)", HERE
    ),
    "an attribute of a module": lambda: checks.wrong_names("`toy.DEFALTS`", HERE),
    "an attribute of a class": lambda: checks.wrong_names("`Policy.prefil`", HERE),
    "a name that stands nowhere": lambda: checks.wrong_names("`group_advantagez`", HERE),
    "a test file that is not there": lambda: checks.missing_tests("tests/test_reward.py"),
    "a test that is not there": lambda: checks.missing_tests("tests/test_rewards.py::test_none"),
    "a -k that selects nothing": lambda: checks.missing_tests("python -m pytest -k 'advantagez'"),
    "a -k without quotes": lambda: checks.missing_tests("python -m pytest -n0 -k advantagez"),
    "an equation that is not there": lambda: checks.dangling_equations("as in eq. 99", {1, 2}),
    "one of several equations": lambda: checks.dangling_equations("eqs. 1, 2 and 99", {1, 2}),
    "a tag left out": lambda: checks.equation_faults(r"\tag{1} \tag{3}"),
    "an equation without a section": lambda: checks.equation_faults(r"\tag{1}"),
    "an equation without a function": lambda: checks.equation_faults(
        "### Eq. 1: x\n\\tag{1}\n- function: rewards\n- kernel: none\n"
        "- test: tests/test_rewards.py::test_format\n- unsaid: no\n"
    ),
    "an equation without a test": lambda: checks.equation_faults(
        "### Eq. 1: x\n\\tag{1}\n- function: [`a`](a.py)\n- kernel: none\n- test: none\n"
        "- unsaid: no\n"
    ),
    "an equation with two tags": lambda: checks.equation_faults(
        "### Eq. 1: x\n\\tag{1} \\tag{2}\n- function: [`a`](a.py)\n- kernel: none\n"
        "- test: tests/test_rewards.py::test_format\n- unsaid: no\n"
    ),
    "a comment misquoted": lambda: checks.misquoted_comments(
        "[`row_kernel`](../kernels/chunked.py) `# s' = s + e^x`", HERE
    ),
    "a comment of another file": lambda: checks.misquoted_comments(
        "[`row_kernel`](../kernels/chunked.py) `# w_t / N`", HERE
    ),
    "a figure that is not measured": lambda: checks.unfounded_figures(
        table("<!-- figures: docs/published.json -->", "51.4")
    ),
    "a figure at another precision": lambda: checks.unfounded_figures(
        table("<!-- figures: docs/published.json -->", "50.41")
    ),
    "a figure between words": lambda: checks.unfounded_figures(
        table("<!-- figures: docs/published.json -->", "11.9 to **99.7 %**")
    ),
    "a file of results that is not there": lambda: checks.unfounded_figures(
        table("<!-- figures: docs/none.json -->", "50.4")
    ),
    "numbers without a file": lambda: checks.unfounded_figures(
        "| a | b |\n|---|---|\n| x | **50.4** |\n"
    ),
    "numbers 'computed' nowhere": lambda: checks.unfounded_figures(
        table("<!-- computed: tests/test_none.py::test_x -->", "1")
    ),
    "an official line nobody looked at": lambda: checks.official_faults("`a/b.py:7`", {}, None),
    "an official line with another word": lambda: checks.official_faults(
        "`tests/doc_checks.py:1`", {"tests/doc_checks.py:1": "no such word"}, PROJECT
    ),
    "a file that code refers to": lambda: checks.missing_references("see docs/equation.md."),
    "a brace left open": lambda: checks.broken_math("so $x^{2$ is"),
    "an environment left open": lambda: checks.broken_math("```math\n\\begin{cases} a\n```\n"),
    "a macro GitHub forbids": lambda: checks.broken_math("$\\operatorname{clip}(x)$"),
    "a file of results that git ignores": lambda: checks.unfounded_figures(
        table("<!-- figures: runs/x.json -->", "1")
    ),
    "a block that fails": lambda: run_block("python", "raise SystemExit(3)", PROJECT),
    "a block whose first line fails": lambda: run_block("bash", "false\ntrue", PROJECT),
    "a block that cannot run": lambda: run_block("json", "{}", PROJECT),
}


@pytest.mark.parametrize("lie", CAUGHT)
def test_the_checks_catch(lie):
    assert CAUGHT[lie]()


TRUTHS = {
    "flags": lambda: checks.wrong_flags("python twgrpo.py --alpha 1.7 | tee x # and so on"),
    "links": lambda: checks.broken_links("# A `b` c\n[x](../README.md) [y](#a-b-c) [z](https://x)",
                                         HERE),  # fmt: skip
    "names": lambda: checks.wrong_names("[`Policy.load`](../model/policy.py) `toy.DEFAULTS`", HERE),
    "tests": lambda: checks.missing_tests("tests/test_rewards.py::test_format; pytest -k format"),
    "figures": lambda: checks.unfounded_figures(
        "<!-- figures: docs/published.json -->\n"
        "| a | b |\n|---|---|\n| Qwen2.5-VL-7B | **50.4**, 9,238 questions, 65.8 % |\n"),
    "words": lambda: checks.unfounded_figures("| a | b |\n|---|---|\n| x | 2 x 80 GB |\n"),
    "blocks": lambda: run_block("bash", "python -c 'import rewards'", PROJECT),
}  # fmt: skip


@pytest.mark.parametrize("truth", TRUTHS)
def test_the_checks_let_pass(truth):
    assert TRUTHS[truth]() == []


def test_marks_are_read_where_they_stand():
    marked = "<!-- run -->\n```bash\ntrue\n```\n\n```bash\nfalse\n```\n"
    assert checks.blocks(marked) == [("bash", "true\n", True), ("bash", "false\n", False)]
    assert checks.slug("Eq. 14: the divergence, `official` form") == (
        "eq-14-the-divergence-official-form"
    )
    assert checks.numbers_in("**50.4** (61.9 to 69.3), 5.6x, -0.5 ± 0.1, GPT-4, `12`, 1,496") == (
        "50.4 61.9 69.3 5.6 -0.5 0.1 1,496".split()
    )
