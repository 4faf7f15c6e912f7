"""The equations of TW-GRPO: `reference.py` specifies them, `head.py` is what the loop calls."""

from kernels.head import token_logps, tw_grpo_head
from kernels.reference import HeadOutput

__all__ = ["HeadOutput", "token_logps", "tw_grpo_head"]
