"""The entry point of the kernels: from one question's hidden states to its TW-GRPO loss.

Triton is imported on first use, so the reference works without it. Shape letters:
`kernels/reference.py`.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from kernels import reference
from kernels.backward import Statistics
from kernels.chunked import lay_out
from kernels.reference import HeadOutput, LossOptions

IMPLS = ("auto", "chunked", "fused", "plain", "reference")
COMPILES_FOR = ("cuda", "meta")  # meta: compiled but not run, see `kernels/compile_check.py`
KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # in float16, gradients of size p / N underflow


def tw_grpo_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    lengths_G: Tensor,
    advantages_G: Tensor,
    *,
    old_logps_N: Tensor | None = None,
    ref_logps_N: Tensor | None = None,
    impl: str = "auto",
    kept_share: float = 1.0,
    **options: float | str | bool,
) -> HeadOutput:
    """The clipped, token-weighted loss of one question, with everything measured along the way.

    hidden_ND     (N, D) float: the hidden states that *predict* the completion tokens, all of c_1,
                  then c_2, ...
    weight_VD     (V, D) same dtype: the lm_head. No gradient is computed unless it requires one.
    targets_N     (N,) int64: the completion tokens themselves, in [0, V)
    lengths_G     (G,) int64: tokens of each completion, EOS included; each at least 1, summing to
                  N. Read on the host, so keep it there: on a GPU, reading it synchronises.
    advantages_G  (G,) float
    old_logps_N   (N,) float: log-probs before the first update on these completions;
                  None: on-policy, ratio 1
    ref_logps_N   (N,) float: log-probs of the reference model, required when beta > 0
    impl          "reference"  plain PyTorch, any float dtype: the specification
                  "chunked"    Triton and cuBLAS, a chunk of positions at a time
                  "fused"      Triton only, logits in registers
                  "plain"      chunked in plain torch; the fallback of "chunked" without Triton
                  "auto"       chunked on CUDA if Triton is installed, else plain
    kept_share    fraction of the `KEPT_BYTES` budget to use for caching rows of logits, as
                  1[v=y] - p, which the backward then need not recompute; 0: none. Questions in the
                  same backward pass share the budget.
    options       alpha, beta, temperature, loss_type, divergence, ...: `LossOptions`

    `chunked` and `fused` take float32 or bfloat16 on CUDA, or float32 on a CPU under
    TRITON_INTERPRET=1; `plain` also float64. A NaN in `hidden_ND` gives a NaN loss.

    Raises ValueError or TypeError naming the offending argument, and RuntimeError if `fused`
    cannot run here or a target is outside the vocabulary (on CUDA a device-side assertion, to
    avoid a synchronisation).
    """
    settings = LossOptions(**options)
    check_tensors(
        hidden_ND=hidden_ND, weight_VD=weight_VD, targets_N=targets_N, lengths_G=lengths_G,
        advantages_G=advantages_G, old_logps_N=old_logps_N, ref_logps_N=ref_logps_N,
    )  # fmt: skip
    lengths = lengths_G.tolist()
    if min(lengths, default=0) < 1 or sum(lengths) != len(hidden_ND):
        raise ValueError(
            f"lengths_G must be at least 1 each and sum to the {len(hidden_ND)} rows of hidden_ND, "
            f"not {lengths}"
        )
    if settings.beta > 0 and ref_logps_N is None:
        raise ValueError("beta > 0 needs ref_logps_N, the log-probs of the reference model")
    layout = lay_out(lengths, hidden_ND.device)
    group = (layout.lengths_G, advantages_G, old_logps_N, ref_logps_N)
    inputs, impl = (hidden_ND, weight_VD, targets_N), choose_impl(impl, hidden_ND)
    if impl == "reference":
        return reference.tw_grpo(*inputs, *group, settings)
    if not (torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)):
        kept_share = 0  # there will be no backward pass
    statistics = Statistics.apply(*inputs, layout, impl, settings, kept_share)
    return reference.weighted_loss(*statistics, *group, settings)


@torch.no_grad()
def token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each target, nats: (N,) float32 or wider, without gradient.

    For old and reference log-probs; arguments as in `tw_grpo_head`.
    """
    # Passed as a group of one completion, for which the divergence is not computed.
    group = hidden_ND, weight_VD, targets_N, torch.tensor([len(hidden_ND)]), hidden_ND.new_zeros(1)
    return tw_grpo_head(*group, temperature=temperature, impl=impl).logps_N


def check_tensors(**tensors: Tensor | None) -> None:
    """Checks each tensor against the shape suffix of its name; an error names the offending one.

    Never synchronises with a GPU.
    """
    hidden_ND, sizes = tensors["hidden_ND"], {}
    for name, x in tensors.items():
        if x is None:
            continue
        letters = name.split("_")[-1]
        shape = tuple(sizes.setdefault(*pair) for pair in zip(letters, x.shape, strict=False))
        is_index = name in ("targets_N", "lengths_G")
        right_kind = x.dtype == torch.int64 if is_index else x.is_floating_point()
        if x.shape != shape or x.ndim != len(letters) or not right_kind:
            raise ValueError(
                f"{name} must be {'int64' if is_index else 'float'} ({', '.join(letters)}) with "
                f"{sizes}, not {x.dtype} {tuple(x.shape)}"
            )
        if x.device != hidden_ND.device and name != "lengths_G":
            raise ValueError(f"{name} is on {x.device} and hidden_ND on {hidden_ND.device}")
    if tensors["weight_VD"].dtype != hidden_ND.dtype:
        raise TypeError(f"weight_VD and hidden_ND ({hidden_ND.dtype}) must have the same dtype")
    targets_N, V = tensors["targets_N"], sizes["V"]
    in_range = (targets_N >= 0) & (targets_N < V)
    # On CUDA the assertion fails asynchronously.
    torch._assert_async(in_range.all(), f"targets_N holds a word outside the vocabulary of {V}")


def choose_impl(impl: str, hidden_ND: Tensor) -> str:
    """Resolves `impl`: "auto" and "chunked" fall back to "plain" where the kernels cannot run, and
    "auto" also avoids the interpreter. Raises RuntimeError if "fused" cannot run, ValueError for
    an unknown name."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, not {impl!r}")
    device, dtype = hidden_ND.device.type, hidden_ND.dtype
    interpreted = device not in COMPILES_FOR and os.environ.get("TRITON_INTERPRET") == "1"
    has_kernels = dtype in KERNEL_DTYPES and find_spec("triton") is not None
    runs = has_kernels and (device in COMPILES_FOR or interpreted)
    if impl in ("auto", "chunked"):
        # Chunked, which does fewer multiplications; which is faster has not been measured yet.
        return "chunked" if runs and not (impl == "auto" and interpreted) else "plain"
    # The bfloat16 dot of Triton's interpreter is wrong.
    if impl == "fused" and not (runs and (dtype == torch.float32 or not interpreted)):
        raise RuntimeError(
            f"impl='fused' cannot run on {device} in {dtype}: it needs Triton, and float32 or "
            "bfloat16 on a GPU, or float32 on a CPU with TRITON_INTERPRET=1 set before Triton is "
            "imported"
        )
    return impl
