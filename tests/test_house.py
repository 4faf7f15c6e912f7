"""The layout of the project: which way imports run, and what it may be installed beside."""

import os
import re
import subprocess
import sys

import pytest
from conftest import PROJECT

# A room imports from those after it, and none from its own place in the line but itself.
LINE = "benchmarks twgrpo eval tools run toy model data records rewards,video,kernels,events files"
PLACE = {room: k for k, rooms in enumerate(LINE.split()) for room in rooms.split(",")}


def test_no_import_runs_upward():
    paths = [*PROJECT.glob("*.py"), *(p for room in PLACE for p in (PROJECT / room).glob("*.py"))]
    for path in paths:
        own = path.relative_to(PROJECT).parts[0].removesuffix(".py")
        assert own in PLACE, "a file without a room"
        imports = re.findall(r"^ *(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        for room in PLACE.keys() & set(imports) - {own}:
            assert PLACE[room] > PLACE[own], f"{path.relative_to(PROJECT)} imports {room}"
            assert own not in ("rewards", "kernels", "events"), f"{own} imports of the project"


HUB = '''
"""As much of Hugging Face's package as transformers asks for while it is imported."""
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **options: (lambda decorated: decorated)
'''


INSTALLED = {
    # within the range that transformers 5.17 uses
    "kernels-0.16.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.0\n",
    "kernels/__init__.py": HUB,
    "kernels/layer/__init__.py": HUB,
    "kernels/layer/mode.py": "class Mode: pass\n",
}


@pytest.mark.slow
def test_hugging_faces_package_of_the_same_name_may_be_installed(tmp_path):
    for name, text in INSTALLED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
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
