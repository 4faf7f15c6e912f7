"""Triton kernels on a chunk of logits in memory: row statistics, group divergence, gradients.

The matmuls around them are in `kernels/chunked.py` and `kernels/backward.py`. Shape letters:
`kernels/reference.py`.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from kernels.chunked import Layout
from kernels.reference import LossOptions
from kernels.tiles import VIEWS, group_spread

CHUNK_ELEMENTS = 2048 * 152064  # logits in memory at a time in the forward, 1.25 GB
ROW_BLOCK = 4096  # words per load in `row_kernel`
GROUP_ELEMENTS = 4096  # words x rows per load in `group_kernel`
GRADIENT_BLOCK = 1024  # words per backward program


@triton.jit(do_not_specialize_on_alignment=VIEWS)
def row_kernel(
    logits_ptr, target_ptr, logp_ptr, peak_ptr, log_sum_ptr,
    V, inverse_temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eqs. 8, 21: log-sum-exp and target log-prob of a row, `reference.vocab_logps` at the target.

    The log-sum-exp is kept in two parts, the row's peak m and log Σ e^(x-m). Their sum would be
    rounded to the precision of the peak, 4e-6 at 60, which would affect every probability in the
    row. Grid: rows of the chunk.
    """
    r = tl.program_id(0)
    row_ptr = logits_ptr + r.to(tl.int64) * V  # 64 bits: rows x V may pass 2^31
    m = float("-inf")
    s = 0.0
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + v, v < V, other=float("-inf")) * inverse_temperature
        m_new = tl.maximum(m, tl.max(x))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new))  # s' = s e^(m-m') + Σ e^(x-m')
        m = m_new
    x = tl.load(row_ptr + tl.load(target_ptr + r)) * inverse_temperature
    tl.store(peak_ptr + r, m)
    tl.store(log_sum_ptr + r, tl.log(s))
    tl.store(logp_ptr + r, x - m - tl.log(s))  # log p(y) = x_y - m - log Σ e^(x-m)


@triton.jit(do_not_specialize=["first_t", "G"], do_not_specialize_on_alignment=VIEWS)
def group_kernel(
    logits_ptr, peak_ptr, log_sum_ptr, start_ptr, partial_ptr,
    first_t, V, G, log_V, inverse_temperature, slice_words,
    FORM: tl.constexpr, UNIFORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eqs. 14, 15: one vocabulary slice's part of D_t, `reference.group_divergence`.

    Grid: positions of the chunk x slices. The alive rows of position t are adjacent: rows start[t]
    to start[t+1] in position-major order.
    """
    start_ptr += first_t + tl.program_id(0)
    start = tl.load(start_ptr)
    alive_count = tl.load(start_ptr + 1) - start
    i = tl.arange(0, ROWS)[:, None]
    alive = i < alive_count
    r = start - tl.load(start_ptr - tl.program_id(0)) + i  # row of the chunk
    peak = tl.load(peak_ptr + r, alive, other=0.0)
    log_sum = tl.load(log_sum_ptr + r, alive, other=0.0)
    row_ptr = logits_ptr + r.to(tl.int64) * V
    ended = (G - alive_count).to(tl.float32) if UNIFORM else 0.0

    total = tl.zeros([1, BLOCK], tl.float32)
    first_word = tl.program_id(1) * slice_words
    for first in range(first_word, tl.minimum(V, first_word + slice_words), BLOCK):
        v = first + tl.arange(0, BLOCK)[None, :]
        x = tl.load(row_ptr + v, alive & (v < V), other=0.0) * inverse_temperature
        spread = group_spread(
            x - peak - log_sum, alive, alive_count.to(tl.float32), ended, log_V, FORM, AXIS=0
        )
        total += tl.where(v < V, spread, 0.0)  # D' = D + Σ_v mean_i (e^d - d - 1)
    partial_ptr += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_ptr, tl.sum(total))


@triton.jit(do_not_specialize=["first_word"], do_not_specialize_on_alignment=VIEWS)
def softmax_gradient_kernel(
    logits_ptr, gradient_ptr, target_ptr, peak_ptr, log_sum_ptr, coefficient_ptr,
    first_word, words, inverse_temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eq. 25: from the logits of a vocabulary slice to their gradients, in place if dtypes match.

    Grid: rows x blocks of words. Reference: autograd of `reference.token_logps`.
    """
    n = tl.program_id(0).to(tl.int64)  # 64 bits: rows x words may pass 2^31
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + n * words + v, v < words, other=0.0) * inverse_temperature
    p = tl.exp(x - tl.load(peak_ptr + n) - tl.load(log_sum_ptr + n))  # p = e^(x-m) / Σ e^(x-m)
    hit = tl.where(first_word + v == tl.load(target_ptr + n), 1.0, 0.0)
    # g = c (1[v=y] - p) / temperature
    gradient = tl.load(coefficient_ptr + n) * inverse_temperature * (hit - p)
    tl.store(gradient_ptr + n * words + v, gradient.to(gradient_ptr.dtype.element_ty), v < words)


def row_statistics(logits_RV: Tensor, targets_R: Tensor, temperature: float) -> Tensor:
    """(3, R): the log-prob of the target, the row's peak, and log Σ e^(x-peak)."""
    R, V = logits_RV.shape
    statistics_3R = logits_RV.new_empty(3, R)
    row_kernel[(R,)](
        logits_RV, targets_R, *statistics_3R, V, 1 / temperature, BLOCK=ROW_BLOCK, num_warps=8
    )
    return statistics_3R


def divergence(
    logits_RV: Tensor, statistics_3R: Tensor, layout: Layout, span: range, options: LossOptions
) -> Tensor:
    """(len(span),): D_t of the positions in the span, given their rows of logits."""
    V, T = logits_RV.shape[1], len(span)
    # One program per position and slice; four vocabulary slices fill the GPU even when a chunk has
    # few positions.
    slices, rows = 4, triton.next_power_of_2(layout.G)
    block = max(GROUP_ELEMENTS // rows, 16)
    slice_words = triton.cdiv(triton.cdiv(V, block), slices) * block
    partial_TS = logits_RV.new_empty(T, slices)
    group_kernel[(T, slices)](
        logits_RV, *statistics_3R[1:], layout.start_of_t, partial_TS,
        span.start, V, layout.G, math.log(V), 1 / options.temperature, slice_words,
        FORM=options.form, UNIFORM=options.ended_rows == "uniform", ROWS=rows, BLOCK=block,
        # Each thread holds four adjacent words and all rows of the group. With more warps, a group
        # is split between two, and each sum and maximum over it needs a barrier.
        num_warps=min(max(block // 128, 1), 4),
    )  # fmt: skip
    return partial_TS.sum(1)


def softmax_gradient(
    logits_NS: Tensor, out_NS: Tensor, targets_N: Tensor, statistics_3N: Tensor,
    coefficients_N: Tensor, first_word: int, temperature: float,
) -> None:  # fmt: skip
    """Writes the gradients of the slice that starts at first_word; out_NS may alias logits_NS."""
    N, words = logits_NS.shape
    softmax_gradient_kernel[(N, triton.cdiv(words, GRADIENT_BLOCK))](
        logits_NS, out_NS, targets_N, *statistics_3N[1:], coefficients_N,
        first_word, words, 1 / temperature, BLOCK=GRADIENT_BLOCK, num_warps=4,
    )  # fmt: skip
