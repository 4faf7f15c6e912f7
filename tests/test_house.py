"""The layout of the project: what it may be installed beside."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import PROJECT

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


def test_hugging_faces_package_of_the_same_name_may_be_installed(tmp_path):
    install(tmp_path, "0.16.0")  # within the range that transformers 5.17 uses
    both = (
        "from transformers.utils import import_utils; assert import_utils.is_kernels_available();"
        "from transformers import AutoModelForImageTextToText;"
        "import eval, twgrpo; from kernels.layer.mode import Mode;"
        "from kernels import tw_grpo_head, get_kernel; print(tw_grpo_head.__module__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", both],
        cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "kernels.head\n"
