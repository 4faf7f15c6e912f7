"""The equations of TW-GRPO: `reference.py` specifies them, `head.py` is the training loop's entry.

Hugging Face's package `kernels`, which transformers imports if it is installed, has the same name,
and Python finds this one first. So that both work, names missing here are looked up there.
"""

import importlib.util
import sys
from importlib import metadata

from kernels.head import token_logps, tw_grpo_head
from kernels.reference import HeadOutput, LossOptions

__all__ = ["HeadOutput", "LossOptions", "token_logps", "tw_grpo_head"]

try:
    _hub = str(metadata.distribution("kernels").locate_file("kernels"))
    __path__.append(_hub)  # its submodules
except metadata.PackageNotFoundError:
    _hub = None


def __getattr__(name: str):
    """Looks a name up in Hugging Face's package. Raises AttributeError if it is not there."""
    if _hub and "kernels._hub" not in sys.modules:
        spec = importlib.util.spec_from_file_location("kernels._hub", f"{_hub}/__init__.py")
        sys.modules["kernels._hub"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if _hub and hasattr(sys.modules["kernels._hub"], name):
        return getattr(sys.modules["kernels._hub"], name)
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")
