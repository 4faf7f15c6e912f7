"""The entry to the kernels: hidden states of one question's completions to the TW-GRPO loss.

Letters as in `kernels/reference.py`: G completions of one question, N their tokens, T the longest,
V words, D hidden. Triton is imported on first use, so that the reference works without it.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from kernels import reference
from kernels.checks import KERNEL_DTYPES, check_group, check_inputs, check_kernels
from kernels.reference import HeadOutput

IMPLS = ("auto", "chunked", "fused", "reference")


@dataclass(frozen=True)
class Sizes:
    """How the kernels cut their work: results depend on it by rounding only. Tests set it tiny."""

    chunk_rows: int = 2048  # rows of logits the chunked forward holds: 1.25 GB at V = 152064
    slice_words: int | None = None  # words at once in the backward; None: see `words_of_backward`
    row_block: int = 4096  # words a row program reads at once
    group_elements: int = 4096  # words x rows a group program reads at once
    gradient_block: int = 1024  # words of one backward program
    objective_block: int = 512  # tokens the loss kernel reads at once
    tile: object = None  # a fused.Tile; None: fused.TILES for the dtype


def words_of_backward(impl: str, N: int) -> int:
    """Words of the vocabulary that the backward holds at once: in bf16, 6 bytes for each of N rows.

    chunked  2^27 / N: 805 MB whatever N is. With dH in float32 (N D 4) 0.92 GB at N = 8,192 and
             1.28 GB at 32,768; the forward needs 1.26 GB (2,048 rows of logits and of hidden).
    fused    2^24 / N: 101 MB, but at least 1,024 words, or adding to dH would cost more than the
             matmul. With dH 0.22 GB at N = 8,192 and 0.67 GB at 32,768; the forward 9 MB.

    A multiple of 256, because cuBLAS is slow on rows that start at odd addresses.
    """
    return max(1024, (2**27 if impl == "chunked" else 2**24) // N // 256 * 256)


@dataclass(frozen=True)
class Rows:
    """Where each of the N tokens stands, computed once on the host from the lengths (`lay_out`).

    Position-major order lists position 0's tokens, then position 1's, ...: a position's alive rows
    are neighbours.
    """

    G: int
    starts: list[int]  # T + 1 numbers: position t owns rows starts[t] .. starts[t + 1]
    start_T1: Tensor  # (T + 1,) int32, the same on the device
    order_N: Tensor  # (N,) int32: token of each row of the position-major order
    completion_N: Tensor  # (N,) int32: completion of each token
    position_N: Tensor  # (N,) int32: position of each token


def lay_out(lengths: list[int], device) -> Rows:
    completion_N, position_N = reference.positions_of_tokens(torch.tensor(lengths))
    order_N = torch.argsort(position_N, stable=True)
    start_T1 = torch.nn.functional.pad(torch.bincount(position_N).cumsum(0), (1, 0))
    tables = [x.to(torch.int32).to(device) for x in (start_T1, order_N, completion_N, position_N)]
    return Rows(len(lengths), start_T1.tolist(), *tables)


class KernelHead(torch.autograd.Function):
    """Forward by `chunked` or `fused`, loss by `objective`, gradient by `backward`."""

    @staticmethod
    def forward(
        ctx, hidden_ND, weight_VD, targets_N, lengths_G, advantages_G, old_logps_N, ref_logps_N,
        rows, impl, sizes, temperature, divergence, ended_rows, loss_options,
    ):  # fmt: skip
        from kernels import chunked, fused
        from kernels.objective import objective

        forward = (chunked if impl == "chunked" else fused).forward
        logps_N, peak_N, log_sum_N, divergence_T = forward(
            hidden_ND, weight_VD, targets_N, rows, temperature, divergence, ended_rows, sizes
        )
        weights_T, coefficients_N, summary = objective(
            logps_N, divergence_T, rows, lengths_G, advantages_G, old_logps_N, ref_logps_N,
            block=sizes.objective_block, **loss_options,
        )  # fmt: skip
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, peak_N, log_sum_N, coefficients_N)
        ctx.temperature, ctx.block = temperature, sizes.gradient_block
        ctx.slice_words = sizes.slice_words or words_of_backward(impl, len(hidden_ND))
        loss, clip_ratio, kl = (x.clone() for x in summary)
        ctx.mark_non_differentiable(logps_N, divergence_T, weights_T, clip_ratio, kl)
        return loss, logps_N, divergence_T, weights_T, clip_ratio, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        from kernels.backward import backward

        dH, dW = backward(
            upstream,
            *ctx.saved_tensors,
            ctx.temperature,
            *ctx.needs_input_grad[:2],
            ctx.slice_words,
            ctx.block,
        )
        return dH, dW, *[None] * 12


def tw_grpo_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    lengths_G: Tensor,
    advantages_G: Tensor,
    *,
    old_logps_N: Tensor | None = None,
    ref_logps_N: Tensor | None = None,
    alpha: float = 1.7,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    beta: float = 0.0,
    temperature: float = 1.0,
    loss_type: str = "tw_grpo",
    divergence: str = "official",
    ended_rows: str = "uniform",
    detach_weights: bool = True,
    impl: str = "auto",
    sizes: Sizes | None = None,
) -> HeadOutput:
    """The clipped, token-weighted loss of one question and everything measured on the way.

    hidden_ND     (N, D) float: the rows that *predict* the completion tokens, all of c_1, then
                  c_2, ...
    weight_VD     (V, D) same dtype: the lm_head. Without requires_grad no gradient of it is formed.
    targets_N     (N,) int64: the completion tokens themselves, in [0, V)
    lengths_G     (G,) int64: tokens of each completion, EOS included; at least 1 each, summing to N
    advantages_G  (G,) float
    old_logps_N   (N,) float: log-probs before the first update on these completions;
                  None: on-policy, ratio 1
    ref_logps_N   (N,) float: log-probs of the reference model, required when beta > 0
    alpha         upper bound of the token weights, >= 1
                  (the code's alpha; tables that say "alpha = 0" mean w = 1)
    loss_type     "tw_grpo" | "grpo";  divergence  "official" | "textbook"
    ended_rows    "uniform" | "exclude": what stands in for completions that have ended, see
                  `reference.group_divergence`
    detach_weights  False (reference only): the gradient flows through w_t too (official code)
    impl          "reference"  plain PyTorch, any float dtype: the specification
                  "chunked"    Triton and cuBLAS, a chunk of positions at a time: the fast one
                  "fused"      Triton only, logits in registers: the small one
                  "auto"       chunked on CUDA if Triton is installed, else reference
    sizes         how the kernels cut their work, see `Sizes`

    `chunked` and `fused` take float32 or bfloat16 on CUDA, or float32 on a CPU under
    TRITON_INTERPRET=1. A NaN in `hidden_ND` gives a NaN loss.

    Raises ValueError or TypeError naming the argument that is wrong, ImportError if Triton is
    needed and missing, RuntimeError if the kernels cannot run on this device.
    """
    check_inputs(hidden_ND, weight_VD, targets_N, temperature)
    lengths = check_group(hidden_ND, lengths_G, advantages_G, old_logps_N, ref_logps_N, alpha, beta)
    for name, value, allowed in (
        ("loss_type", loss_type, ("tw_grpo", "grpo")),
        ("divergence", divergence, ("official", "textbook")),
        ("ended_rows", ended_rows, ("uniform", "exclude")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    impl = choose_impl(impl, hidden_ND)
    loss_options = dict(
        alpha=alpha, eps_low=eps_low, eps_high=eps_high, beta=beta, loss_type=loss_type
    )
    if impl == "reference":
        return reference.tw_grpo(
            hidden_ND, weight_VD, targets_N, lengths_G, advantages_G,
            old_logps_N=old_logps_N, ref_logps_N=ref_logps_N,
            temperature=temperature, divergence=divergence,
            ended_rows=ended_rows, detach_weights=detach_weights, **loss_options,
        )  # fmt: skip
    check_kernels(impl, hidden_ND, weight_VD, targets_N)
    if not detach_weights:
        raise ValueError(
            f"detach_weights=False needs impl='reference': {impl} has no gradient through w_t"
        )
    return kernel_head(
        lay_out(lengths, hidden_ND.device), hidden_ND, weight_VD, targets_N, lengths_G,
        advantages_G, old_logps_N=old_logps_N, ref_logps_N=ref_logps_N, impl=impl, sizes=sizes,
        temperature=temperature, divergence=divergence, ended_rows=ended_rows, **loss_options,
    )  # fmt: skip


def kernel_head(
    rows: Rows, hidden_ND, weight_VD, targets_N, lengths_G, advantages_G, *,
    old_logps_N=None, ref_logps_N=None, impl="chunked", sizes=None, temperature=1.0,
    divergence="official", ended_rows="uniform", alpha=1.7, eps_low=0.2, eps_high=0.28, beta=0.0,
    loss_type="tw_grpo",
) -> HeadOutput:  # fmt: skip
    """`tw_grpo_head` by the kernels and without its checks: nothing here waits for the GPU.

    rows  from `lay_out(lengths, device)`; the rest as there. For those who measure the kernels.
    """
    loss_options = dict(
        alpha=alpha, eps_low=eps_low, eps_high=eps_high, beta=beta, loss_type=loss_type
    )
    return HeadOutput(
        *KernelHead.apply(
            hidden_ND, weight_VD, targets_N, lengths_G, advantages_G, old_logps_N, ref_logps_N,
            rows, impl, sizes or Sizes(), temperature, divergence, ended_rows, loss_options,
        )
    )  # fmt: skip


@torch.no_grad()
def token_logps(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0,
    impl: str = "auto",
    sizes: Sizes | None = None,
) -> Tensor:  # fmt: skip
    """Log-probability of each target, nats: (N,) float32 or wider, without gradient.

    For the old and the reference log-probs; arguments as in `tw_grpo_head`.
    """
    check_inputs(hidden_ND, weight_VD, targets_N, temperature)
    impl = choose_impl(impl, hidden_ND)
    if impl == "reference":
        return reference.token_logps(hidden_ND, weight_VD, targets_N, temperature)
    check_kernels(impl, hidden_ND, weight_VD, targets_N)
    from kernels import chunked, fused

    run = (chunked if impl == "chunked" else fused).token_logps
    return run(hidden_ND, weight_VD, targets_N, temperature, sizes or Sizes())


def choose_impl(impl: str, hidden_ND: Tensor) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, not {impl!r}")
    if impl != "auto":
        return impl
    kernels_fit = hidden_ND.is_cuda and hidden_ND.dtype in KERNEL_DTYPES and find_spec("triton")
    # Which of the two kernels is faster has not yet been measured; chunked does fewer
    # multiplications.
    return "chunked" if kernels_fit else "reference"
