"""The entry to the kernels: hidden states of one question's completions to the TW-GRPO loss.

Triton is imported on first use, so that the reference works without it. Shape letters:
`kernels/reference.py`.
"""

import os
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from kernels import chunked, reference
from kernels.checks import COMPILES_FOR, KERNEL_DTYPES, check_group, check_inputs, check_kernels
from kernels.chunked import Layout, lay_out
from kernels.reference import HeadOutput, LossOptions

# For what the forward keeps: 4,110 rows in bf16 at V = 152064. Plain torch keeps less, so that on a
# CPU too the head's memory stays near one copy of 512 rows of logits.
KEPT_BYTES, KEPT_BYTES_PLAIN = 1.25e9, 0.05e9
IMPLS = ("auto", "chunked", "fused", "plain", "reference")


def modules(impl: str) -> tuple[ModuleType, ModuleType]:
    """(the module whose `forward` it is, the one that works on logits in memory)."""
    if impl == "plain":
        from kernels import plain

        return chunked, plain
    from kernels import fused, logits

    return (fused if impl == "fused" else chunked), logits


class Statistics(torch.autograd.Function):
    """Eqs. 8 and 12 to 15 by the kernels: (logps_N, divergence_T), the second without gradient."""

    @staticmethod
    def forward(
        ctx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        layout: Layout,
        impl: str,
        options: LossOptions,
        kept_bytes: float,
    ) -> tuple[Tensor, Tensor]:
        design, steps = modules(impl)
        inputs = hidden_ND, weight_VD, targets_N
        N, V = len(hidden_ND), len(weight_VD)
        K = min(N, int(kept_bytes / hidden_ND.element_size() / V))
        kept_KV = hidden_ND.new_empty(K, V)
        statistics_3N, divergence_T = design.forward(*inputs, layout, options, steps, kept_KV)
        ctx.save_for_backward(*inputs, statistics_3N, layout.order_N, kept_KV)
        ctx.impl, ctx.temperature = impl, options.temperature
        ctx.mark_non_differentiable(divergence_T)
        return statistics_3N[0].clone(), divergence_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, coefficients_N: Tensor, _) -> tuple[Tensor | None, ...]:
        from kernels.backward import backward, words_of_slice

        hidden_ND, *_, kept_KV = ctx.saved_tensors
        N, K = len(hidden_ND), len(kept_KV)
        words = words_of_slice(ctx.impl, max(1, N - K), hidden_ND.shape[1] if K else 0)
        dH, dW = backward(
            coefficients_N.contiguous(),
            *ctx.saved_tensors,
            *ctx.needs_input_grad[:2],
            ctx.temperature,
            words,
            modules(ctx.impl)[1],
        )
        return dH, dW, None, None, None, None, None


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
    kept_bytes: float = KEPT_BYTES,
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
    kept_bytes    budget for the rows of logits that `chunked` and `plain` keep for the backward, as
                  1[v=y] - p, and need not compute again; 0: none. Questions whose losses are
                  differentiated together share it.
    options       alpha, beta, temperature, loss_type, divergence, ...: `LossOptions`

    `chunked` and `fused` take float32 or bfloat16 on CUDA, or float32 on a CPU under
    TRITON_INTERPRET=1; `plain` also float64. A NaN in `hidden_ND` gives a NaN loss.

    Raises ValueError or TypeError naming the argument that is wrong, ImportError if Triton is
    needed and missing, RuntimeError if the kernels cannot run on this device. On CUDA a target
    outside the vocabulary is a device-side assertion instead, so that nothing waits for the GPU.
    """
    settings = LossOptions(**options)
    check_inputs(hidden_ND, weight_VD, targets_N)
    group = (lengths_G, advantages_G, old_logps_N, ref_logps_N)
    lengths = check_group(hidden_ND, *group, settings.beta)
    layout = lay_out(lengths, hidden_ND.device)
    group = (layout.lengths_G, *group[1:])
    impl = choose_impl(impl, hidden_ND, settings)
    if impl == "reference":
        return reference.tw_grpo(hidden_ND, weight_VD, targets_N, *group, settings)
    check_kernels(impl, hidden_ND, settings)
    wants_gradient = hidden_ND.requires_grad or weight_VD.requires_grad
    if impl == "fused" or not (wants_gradient and torch.is_grad_enabled()):
        kept_bytes = 0  # "fused" has no logits in memory to keep
    elif impl == "plain":
        kept_bytes *= KEPT_BYTES_PLAIN / KEPT_BYTES
    inputs = (x.contiguous() for x in (hidden_ND, weight_VD, targets_N))
    statistics = Statistics.apply(*inputs, layout, impl, settings, kept_bytes)
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
    options = LossOptions(temperature=temperature)
    check_inputs(hidden_ND, weight_VD, targets_N)
    impl = choose_impl(impl, hidden_ND, options)
    if impl == "reference":
        return reference.token_logps(hidden_ND, weight_VD, targets_N, temperature)
    check_kernels(impl, hidden_ND, options)
    layout = lay_out([len(hidden_ND)], hidden_ND.device)  # one completion: no divergence
    inputs = (x.contiguous() for x in (hidden_ND, weight_VD, targets_N))
    design, steps = modules(impl)
    nothing = hidden_ND.new_empty(0, len(weight_VD))
    return design.forward(*inputs, layout, options, steps, nothing)[0][0]


def choose_impl(impl: str, hidden_ND: Tensor, options: LossOptions) -> str:
    """What runs. "auto" and "chunked" are "plain" on a CPU, unless TRITON_INTERPRET=1 for the
    second, and for dtypes that the kernels do not take."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, not {impl!r}")
    compiles = hidden_ND.device.type in COMPILES_FOR and hidden_ND.dtype in KERNEL_DTYPES
    native = compiles and find_spec("triton")
    if impl == "chunked" and not native:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton")
        return "chunked" if interpreted else "plain"
    if impl != "auto":
        return impl
    # Which of the two designs is faster has not yet been measured; chunked does fewer
    # multiplications.
    return "chunked" if native else "plain"
