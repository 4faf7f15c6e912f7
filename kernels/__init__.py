"""The equations of TW-GRPO: `reference.py` specifies them, `head.py` is what the loop calls.

Hugging Face's package `kernels`, which transformers imports where it is installed, has the name of
this directory, and Python finds ours first. So that both work, what is not here is looked up there.
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
    """A name of Hugging Face's package. Raises AttributeError, as every missing name does."""
    if _hub and "kernels._hub" not in sys.modules:
        spec = importlib.util.spec_from_file_location("kernels._hub", f"{_hub}/__init__.py")
        sys.modules["kernels._hub"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if _hub and hasattr(sys.modules["kernels._hub"], name):
        return getattr(sys.modules["kernels._hub"], name)
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")
