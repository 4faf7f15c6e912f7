"""What README and train.sh say exists, exists."""

import dataclasses
import importlib
import json
import re

import pytest
from conftest import PROJECT, run_twgrpo

from config import Config

README = (PROJECT / "README.md").read_text(encoding="utf-8")
MODULES = (
    "twgrpo config questions packing policy rollout rewards data video loader eval toy runlog "
    "checkpoint plan ranks viz kernels kernels.reference"
).split()
FLAGS = {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("name", ["README.md", "train.sh"])
def test_every_flag_named_exists(name):
    text = (PROJECT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"--([a-z][a-z_]+)", text)) - {"help"}
    others = "benchmarks/step.py kernels/bench.py eval.py data.py viz.py".split()
    sources = "".join((PROJECT / path).read_text(encoding="utf-8") for path in others)
    known = FLAGS | set(re.findall(r'"--([a-z_]+)"', sources)) | {"standalone", "nproc_per_node"}
    assert named and named <= known, named - known


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) >= 10 and all((PROJECT / link).exists() for link in links)


def test_every_function_named_exists():
    """Backticked names without a dot or slash are functions, or values the tables explain."""
    modules = [importlib.import_module(name) for name in MODULES]
    steps = README[README.index("## The algorithm") : README.index("| file | its one concern")]
    for name in re.findall(r"`([A-Za-z_.]+)`", steps):
        owner, _, attribute = name.rpartition(".")
        owners = [getattr(m, owner, None) for m in modules] if owner else modules
        assert any(hasattr(o, attribute) for o in owners if o), name


def test_the_metric_table_names_every_metric_and_no_other(world, tmp_path):
    result = run_twgrpo(world, tmp_path / "r", "--max_steps", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    row = json.loads((tmp_path / "r" / "metrics.jsonl").read_text())
    table = README[README.index("## Metrics") : README.index("## Where this differs")]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`([a-z_/]+)`", cell)}
    assert named == set(row) - {"step"}


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"TABLE|TODO|FIXME|XXX", README)
