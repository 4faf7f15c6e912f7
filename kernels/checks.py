"""Checks of the head's arguments; each raises an error that names the argument.

Shape letters: `kernels/reference.py`. Nothing here waits for a GPU unless lengths_G is on one.
"""

import torch
from torch import Tensor

from kernels.reference import LossOptions

COMPILES_FOR = ("cuda", "meta")  # meta: compiled and not run, see `kernels/compile_check.py`
KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # float16 would flush gradients of 1/N p to zero


def expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], kind: str, device: torch.device
) -> None:
    """Raises ValueError unless the tensor has this shape, is "int64" or "float", and is there."""
    right_kind = tensor.is_floating_point() if kind == "float" else tensor.dtype == torch.int64
    if tensor.shape != shape or not right_kind:
        raise ValueError(
            f"{name} must be {kind} of shape {shape}, not {tensor.dtype} {tuple(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and hidden_ND on {device}: move one")


def check_inputs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    """What every head reads. Raises ValueError, or TypeError for two dtypes."""
    if hidden_ND.ndim != 2:
        raise ValueError(f"hidden_ND must be (N, D), not {tuple(hidden_ND.shape)}")
    (N, D), V, device = hidden_ND.shape, len(weight_VD), hidden_ND.device
    expect("hidden_ND", hidden_ND, (N, D), "float", device)
    expect("weight_VD", weight_VD, (V, D), "float", device)
    expect("targets_N", targets_N, (N,), "int64", device)
    if weight_VD.dtype != hidden_ND.dtype:
        raise TypeError(
            f"weight_VD is {weight_VD.dtype} and hidden_ND {hidden_ND.dtype}: cast one to the other"
        )
    if N == 0:
        raise ValueError("hidden_ND has no rows: a group needs at least one completion token")
    in_range = (targets_N >= 0) & (targets_N < V)
    message = f"targets_N holds a word outside the vocabulary of {V}"
    if device.type == "cpu" and not in_range.all():
        raise ValueError(message)
    if device.type == "cuda":  # the assertion fails when the GPU gets there
        torch._assert_async(in_range.all(), message)


def check_group(
    hidden_ND: Tensor,
    lengths_G: Tensor,
    advantages_G: Tensor,
    old_logps_N: Tensor | None,
    ref_logps_N: Tensor | None,
    beta: float,
) -> list[int]:
    """How the N rows belong to G completions. Returns the lengths on the host."""
    N, G, device = len(hidden_ND), lengths_G.numel(), hidden_ND.device
    expect("lengths_G", lengths_G, (G,), "int64", lengths_G.device)
    lengths = lengths_G.tolist()
    if min(lengths, default=0) < 1:
        raise ValueError(
            f"lengths_G must be at least 1 each (an empty completion has no token), not {lengths}"
        )
    if sum(lengths) != N:
        raise ValueError(
            f"lengths_G sums to {sum(lengths)}, but hidden_ND and targets_N have {N} rows"
        )
    expect("advantages_G", advantages_G, (G,), "float", device)
    for name, logps in (("old_logps_N", old_logps_N), ("ref_logps_N", ref_logps_N)):
        if logps is not None:
            expect(name, logps, (N,), "float", device)
    if beta > 0 and ref_logps_N is None:
        raise ValueError("beta > 0 needs ref_logps_N, the log-probs of the reference model")
    return lengths


def check_kernels(impl: str, hidden_ND: Tensor, options: LossOptions) -> None:
    """What only the kernels require. Raises RuntimeError, TypeError or ValueError."""
    if impl == "plain":
        return
    from triton.runtime.jit import JITFunction

    from kernels.logits import row_kernel

    is_compiled = isinstance(row_kernel, JITFunction)  # not interpreted
    if is_compiled and hidden_ND.device.type not in COMPILES_FOR:
        raise RuntimeError(
            f"impl={impl!r} compiles for a GPU, and hidden_ND is on {hidden_ND.device}: use "
            "impl='plain', or set TRITON_INTERPRET=1 before Triton is imported to run the "
            "kernels in its interpreter"
        )
    if hidden_ND.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"hidden_ND must be float32 or bfloat16 for impl={impl!r}, not {hidden_ND.dtype}"
        )
    if hidden_ND.dtype == torch.bfloat16 and impl == "fused" and hidden_ND.device.type == "cpu":
        raise TypeError(
            "hidden_ND must be float32 for impl='fused' on a CPU: the bfloat16 dot of Triton's "
            "interpreter is wrong"
        )
