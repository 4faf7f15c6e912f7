"""The entry to the kernels: hidden states of one question's completions to the TW-GRPO loss.

Triton is imported on first use, so that the reference works without it. Shape letters:
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
COMPILES_FOR = ("cuda", "meta")  # meta: compiled and not run, see `kernels/compile_check.py`
KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # float16 would flush gradients of 1/N p to zero


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
    """The clipped, token-weighted loss of one question and everything measured on the way.

    hidden_ND     (N, D) float: the rows that *predict* the completion tokens, all of c_1, then
                  c_2, ...
    weight_VD     (V, D) same dtype: the lm_head. Without requires_grad no gradient of it is formed.
    targets_N     (N,) int64: the completion tokens themselves, in [0, V)
    lengths_G     (G,) int64: tokens of each completion, EOS included; at least 1 each, summing to
                  N. Read on the host: if it is on a GPU, the host waits for it.
    advantages_G  (G,) float
    old_logps_N   (N,) float: log-probs before the first update on these completions;
                  None: on-policy, ratio 1
    ref_logps_N   (N,) float: log-probs of the reference model, required when beta > 0
    impl          "reference"  plain PyTorch, any float dtype: the specification
                  "chunked"    Triton and cuBLAS, a chunk of positions at a time
                  "fused"      Triton only, logits in registers
                  "plain"      chunked in plain torch; "chunked" is this where Triton cannot run
                  "auto"       chunked on CUDA if Triton is installed, else plain
    kept_share    of the memory for rows of logits (`KEPT_BYTES`) that the forward keeps, as
                  1[v=y] - p, and the backward need not compute again; 0: none. Questions whose
                  losses are differentiated together share it.
    options       alpha, beta, temperature, loss_type, divergence, ...: `LossOptions`

    `chunked` and `fused` take float32 or bfloat16 on CUDA, or float32 on a CPU under
    TRITON_INTERPRET=1; `plain` also float64. A NaN in `hidden_ND` gives a NaN loss.

    Raises ValueError or TypeError naming the argument that is wrong, and RuntimeError if `fused`
    cannot run here, or for a target outside the vocabulary; on CUDA that is a device-side
    assertion, so that nothing waits for the GPU.
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
        kept_share = 0  # no backward will ask for them
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

    For the old and the reference log-probs; arguments as in `tw_grpo_head`.
    """
    # As one completion: alone it has no divergence, which is then not computed.
    group = hidden_ND, weight_VD, targets_N, torch.tensor([len(hidden_ND)]), hidden_ND.new_zeros(1)
    return tw_grpo_head(*group, temperature=temperature, impl=impl).logps_N


def check_tensors(**tensors: Tensor | None) -> None:
    """Raises an error that names the tensor that is not what its name says.

    The last letters of a name are its shape. Nothing here waits for a GPU.
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
        raise TypeError(f"weight_VD and hidden_ND ({hidden_ND.dtype}) must be of one dtype")
    targets_N, V = tensors["targets_N"], sizes["V"]
    in_range = (targets_N >= 0) & (targets_N < V)
    # On CUDA the assertion fails when the GPU gets there.
    torch._assert_async(in_range.all(), f"targets_N holds a word outside the vocabulary of {V}")


def choose_impl(impl: str, hidden_ND: Tensor) -> str:
    """What runs: "auto" and "chunked" are "plain" where the kernels cannot run, and "auto" is where
    they would be interpreted. Raises RuntimeError for "fused" there, ValueError for any other."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, not {impl!r}")
    device, dtype = hidden_ND.device.type, hidden_ND.dtype
    interpreted = device not in COMPILES_FOR and os.environ.get("TRITON_INTERPRET") == "1"
    has_kernels = dtype in KERNEL_DTYPES and find_spec("triton") is not None
    runs = has_kernels and (device in COMPILES_FOR or interpreted)
    if impl in ("auto", "chunked"):
        # Which of the two designs is faster has not yet been measured; chunked does fewer
        # multiplications.
        return "chunked" if runs and not (impl == "auto" and interpreted) else "plain"
    # The bfloat16 dot of Triton's interpreter is wrong.
    if impl == "fused" and not (runs and (dtype == torch.float32 or not interpreted)):
        raise RuntimeError(
            f"impl='fused' cannot run on {device} in {dtype}: it needs Triton, and float32 or "
            "bfloat16 on a GPU, or float32 on a CPU with TRITON_INTERPRET=1 set before Triton is "
            "imported"
        )
    return impl
