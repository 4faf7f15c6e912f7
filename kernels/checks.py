"""What a caller of the head may get wrong, each with a sentence that names the argument.

Letters as in `kernels/reference.py`. On a GPU these checks wait for it twice: for the range of the
targets and for the lengths, which the host needs anyway.
"""

from importlib.util import find_spec

import torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # float16 would flush gradients of 1/N p to zero


def check_inputs(hidden_ND, weight_VD, targets_N, temperature) -> None:
    """Shapes, dtypes, ranges of what a head reads; raises an error that names the argument."""
    if hidden_ND.ndim != 2 or not hidden_ND.is_floating_point():
        raise ValueError(
            "hidden_ND must be a float (N, D) matrix, "
            f"not {hidden_ND.dtype} {tuple(hidden_ND.shape)}"
        )
    N, D = hidden_ND.shape
    if weight_VD.ndim != 2 or weight_VD.shape[1] != D:
        raise ValueError(
            f"weight_VD must be (V, D) with D = {D} as in hidden_ND, not {tuple(weight_VD.shape)}"
        )
    if weight_VD.dtype != hidden_ND.dtype:
        raise TypeError(
            f"weight_VD is {weight_VD.dtype} and hidden_ND {hidden_ND.dtype}: cast one to the other"
        )
    if targets_N.shape != (N,) or targets_N.dtype != torch.int64:
        raise ValueError(
            f"targets_N must be ({N},) int64, not {tuple(targets_N.shape)} {targets_N.dtype}"
        )
    if N == 0:
        raise ValueError("hidden_ND has no rows: a group needs at least one completion token")
    check_device(hidden_ND, weight_VD=weight_VD, targets_N=targets_N)
    low, high = torch.stack(targets_N.aminmax()).tolist()
    if low < 0 or high >= weight_VD.shape[0]:
        raise ValueError(
            f"targets_N holds {low}..{high}, outside the vocabulary of {weight_VD.shape[0]} words"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")


def check_group(
    hidden_ND, lengths_G, advantages_G, old_logps_N, ref_logps_N, alpha, beta
) -> list[int]:
    """The lengths on the host. Checks what ties the N rows to the G completions.

    Raises ValueError or TypeError naming the argument.
    """
    N = len(hidden_ND)
    if lengths_G.ndim != 1 or lengths_G.dtype != torch.int64:
        raise ValueError(
            f"lengths_G must be (G,) int64, not {tuple(lengths_G.shape)} {lengths_G.dtype}"
        )
    lengths = lengths_G.tolist()
    if min(lengths, default=0) < 1:
        raise ValueError(
            f"lengths_G must be at least 1 each (an empty completion has no token), not {lengths}"
        )
    if sum(lengths) != N:
        raise ValueError(
            f"lengths_G sums to {sum(lengths)}, but hidden_ND and targets_N have {N} rows"
        )
    if advantages_G.shape != lengths_G.shape or not advantages_G.is_floating_point():
        raise ValueError(
            f"advantages_G must be a float vector like lengths_G {tuple(lengths_G.shape)}, "
            f"not {advantages_G.dtype} {tuple(advantages_G.shape)}"
        )
    for name, logps in (("old_logps_N", old_logps_N), ("ref_logps_N", ref_logps_N)):
        if logps is not None and (logps.shape != (N,) or not logps.is_floating_point()):
            raise ValueError(
                f"{name} must be a float ({N},) vector, not {logps.dtype} {tuple(logps.shape)}"
            )
    check_device(
        hidden_ND,
        lengths_G=lengths_G,
        advantages_G=advantages_G,
        old_logps_N=old_logps_N,
        ref_logps_N=ref_logps_N,
    )
    if not alpha >= 1:
        raise ValueError(
            f"alpha is the upper bound of the token weights and must be at least 1, not {alpha}"
        )
    if beta > 0 and ref_logps_N is None:
        raise ValueError("beta > 0 needs ref_logps_N, the log-probs of the reference model")
    if not beta >= 0:
        raise ValueError(f"beta must be 0 or more, not {beta}")
    return lengths


def check_device(hidden_ND, **others) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden_ND.device:
            raise ValueError(
                f"{name} is on {tensor.device} and hidden_ND on {hidden_ND.device}: move one"
            )


def check_kernels(impl, hidden_ND, weight_VD, targets_N) -> None:
    """What only the kernels ask for; raises an error that names the argument or the remedy."""
    if not find_spec("triton"):
        raise ImportError(
            f"impl={impl!r} needs Triton, which is not installed: pip install triton (Linux)"
        )
    from triton.runtime.jit import JITFunction

    from kernels.chunked import row_kernel

    if not hidden_ND.is_cuda and isinstance(row_kernel, JITFunction):  # compiled, not interpreted
        raise RuntimeError(
            f"impl={impl!r} compiles for a GPU, and hidden_ND is on {hidden_ND.device}: use "
            "impl='reference', or set TRITON_INTERPRET=1 before Triton is imported to run the "
            "kernels in its interpreter"
        )
    for name, tensor in (
        ("hidden_ND", hidden_ND),
        ("weight_VD", weight_VD),
        ("targets_N", targets_N),
    ):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous for impl={impl!r}: call .contiguous() on it"
            )
    if hidden_ND.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"hidden_ND must be float32 or bfloat16 for impl={impl!r}, not {hidden_ND.dtype}"
        )
    if hidden_ND.dtype == torch.bfloat16 and impl == "fused" and not hidden_ND.is_cuda:
        raise TypeError(
            "hidden_ND must be float32 for impl='fused' on a CPU: the bfloat16 dot of Triton's "
            "interpreter is wrong"
        )
