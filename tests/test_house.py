"""The layout of the project: which way imports run, and what it may be installed beside."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

# A room imports from those after it, and none from its own place in the line but itself.
ROOMS = [
    ["benchmarks"],
    ["twgrpo"],
    ["eval"],
    ["tools"],
    ["run"],
    ["toy"],
    ["model"],
    ["data"],
    ["records"],
    ["rewards", "video", "kernels", "events"],
    ["files"],
]
PLACE = {room: place for place, rooms in enumerate(ROOMS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports from, also inside functions."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names} & PLACE.keys()


def test_no_import_runs_upward():
    paths = [*PROJECT.glob("*.py"), *(p for room in PLACE for p in (PROJECT / room).glob("*.py"))]
    for path in paths:
        own = path.relative_to(PROJECT).parts[0].removesuffix(".py")
        assert own in PLACE, "a file without a room"
        for room in imported_rooms(path) - {own}:
            assert PLACE[room] > PLACE[own], f"{path.relative_to(PROJECT)} imports {room}"
            assert own not in ("rewards", "kernels", "events"), f"{own} imports of the project"


HUB = '''
"""As much of Hugging Face's package as transformers asks for while it is imported."""
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **options: (lambda decorated: decorated)
'''


def install(site: Path, version: str) -> None:
    """Puts a distribution `kernels` of that version into the directory `site`."""
    info = site / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    for package in ("kernels", "kernels/layer"):
        (site / package).mkdir()
        (site / package / "__init__.py").write_text(HUB)
    (site / "kernels" / "layer" / "mode.py").write_text("class Mode: pass\n")


@pytest.mark.slow
def test_hugging_faces_package_of_the_same_name_may_be_installed(tmp_path):
    install(tmp_path, "0.16.0")  # within the range that transformers 5.17 uses
    both = (
        "from transformers.utils import import_utils; assert import_utils.is_kernels_available();"
        "from transformers import AutoModelForImageTextToText;"
        "import eval, twgrpo; from kernels.layer.mode import Mode;"
        "from kernels import tw_grpo_head, get_kernel; print(tw_grpo_head.__module__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", both]
    printed = subprocess.check_output(command, cwd=PROJECT, env=environment, text=True, timeout=120)
    assert printed == "kernels.head\n"
