"""The equations of TW-GRPO. `reference.py` is the specification; `head.py` is the entry the training loop calls."""

from kernels.head import token_logps, tw_grpo_head
from kernels.reference import HeadOutput

__all__ = ["HeadOutput", "token_logps", "tw_grpo_head"]
