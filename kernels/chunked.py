"""The fast forward: cuBLAS multiplies a chunk of positions, Triton does the rest while the chunk is
in memory.

Recomputing a logit costs D = 3584 multiplications, reading it back one access, so a chunk of about
2,048 rows is written once in float32 and read twice: by rows for the log-sum-exp, by groups for the
divergence. Letters as in `kernels/reference.py`.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.tiles import VIEWS, group_spread


@triton.jit(do_not_specialize_on_alignment=VIEWS)
def row_kernel(
    logits_ptr, target_ptr, order_ptr, logp_ptr, peak_ptr, log_sum_ptr,
    V, inverse_temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eqs. 8, 21: log-sum-exp and target log-prob of a row, `reference.vocab_logps` at the target.

    The log-sum-exp is kept in two parts, the row's peak m and log Σ e^(x-m): their sum would be
    rounded to the peak's last digit, 4e-6 at 60, and with it every probability of the row.
    Grid: rows of the chunk.
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
    n = tl.load(order_ptr + r)
    x = tl.load(row_ptr + tl.load(target_ptr + n)) * inverse_temperature
    tl.store(peak_ptr + n, m)
    tl.store(log_sum_ptr + n, tl.log(s))
    tl.store(logp_ptr + n, x - m - tl.log(s))  # log p(y) = x_y - m - log Σ e^(x-m)


@triton.jit(do_not_specialize=["first_t", "G"], do_not_specialize_on_alignment=VIEWS)
def group_kernel(
    logits_ptr, peak_ptr, log_sum_ptr, order_ptr, start_ptr, partial_ptr,
    first_t, V, G, log_V, inverse_temperature, slice_words,
    TEXTBOOK: tl.constexpr, UNIFORM: tl.constexpr,
    SLICES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eqs. 14, 15: one slice of the vocabulary of D_t, `reference.group_divergence`.

    Grid: positions of the chunk x slices. The alive rows of position t are neighbours, rows
    start[t] to start[t+1] of the position-major order.
    """
    t = first_t + tl.program_id(0)
    slice_id = tl.program_id(1)
    start = tl.load(start_ptr + t)
    alive_count = tl.load(start_ptr + t + 1) - start
    i = tl.arange(0, ROWS)[:, None]
    alive = i < alive_count
    n = tl.load(order_ptr + start + i, alive, other=0)
    peak, log_sum = tl.load(peak_ptr + n), tl.load(log_sum_ptr + n)
    row_ptr = logits_ptr + (start - tl.load(start_ptr + first_t) + i).to(tl.int64) * V
    ended = (G - alive_count).to(tl.float32) if UNIFORM else 0.0

    total = tl.zeros([1, BLOCK], tl.float32)
    for first in range(slice_id * slice_words, tl.minimum(V, (slice_id + 1) * slice_words), BLOCK):
        v = first + tl.arange(0, BLOCK)[None, :]
        x = tl.load(row_ptr + v, alive & (v < V), other=0.0) * inverse_temperature
        spread = group_spread(
            x - peak - log_sum, alive, alive_count.to(tl.float32), ended, log_V, TEXTBOOK, AXIS=0
        )
        total += tl.where(v < V, spread, 0.0)  # D' = D + Σ_v mean_i (e^d - d - 1)
    tl.store(partial_ptr + t * SLICES + slice_id, tl.sum(total))


def matmul_float32(a, b, out):
    """out = a @ b in float32 for inputs of any float dtype.

    Rounding the logits to bf16 instead moves D by 3.5e-3 relative (measured at V = 152064).
    """
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)  # no such product on a CPU, where tests run


def chunks_of_positions(starts: list[int], chunk_rows: int):
    """Ranges [first, last) of at most chunk_rows alive rows, or of one position if it has more."""
    first = 0
    for last in range(1, len(starts)):
        if last + 1 == len(starts) or starts[last + 1] - starts[first] > chunk_rows:
            yield first, last
            first = last


def forward(hidden_ND, weight_VD, targets_N, rows, temperature, divergence, ended_rows, sizes):
    """(logps_N, peak_N, log_sum_N, divergence_T), float32.

    Memory beyond outputs: one chunk of logits, chunk_rows V 4 bytes = 2048 x 152064 x 4 = 1.25 GB,
    whatever N is.
    """
    V, G, T = len(weight_VD), rows.G, len(rows.starts) - 1
    logps_N, peak_N, log_sum_N = hidden_ND.new_empty(3, len(hidden_ND), dtype=torch.float32)
    chunks = list(chunks_of_positions(rows.starts, sizes.chunk_rows))
    widest = max(rows.starts[last] - rows.starts[first] for first, last in chunks)
    buffer = hidden_ND.new_empty(widest, V, dtype=torch.float32)

    # A position is a program; four slices of the vocabulary each fill the GPU also when few
    # positions are in a chunk.
    slices, padded = 4, triton.next_power_of_2(G)
    block = max(sizes.group_elements // padded, 16)
    slice_words = triton.cdiv(triton.cdiv(V, block), slices) * block
    # Four neighbouring words to each thread, and all the rows of a group: with more warps than that
    # a group is spread over two of them, and each of its sums and maxima has to wait for both.
    warps = min(max(block // 128, 1), 4)
    partial_TS = hidden_ND.new_empty(T, slices, dtype=torch.float32)
    for first, last in chunks:
        order = rows.order_N[rows.starts[first] : rows.starts[last]]
        logits = matmul_float32(hidden_ND[order], weight_VD.T, out=buffer[: len(order)])
        row_kernel[(len(order),)](
            logits, targets_N, order, logps_N, peak_N, log_sum_N,
            V, 1 / temperature, BLOCK=sizes.row_block, num_warps=8,
        )  # fmt: skip
        group_kernel[(last - first, slices)](
            logits, peak_N, log_sum_N, rows.order_N, rows.start_T1, partial_TS,
            first, V, G, math.log(V), 1 / temperature, slice_words,
            TEXTBOOK=divergence == "textbook", UNIFORM=ended_rows == "uniform",
            SLICES=slices, ROWS=padded, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return logps_N, peak_N, log_sum_N, partial_TS.sum(1)


def token_logps(hidden_ND, weight_VD, targets_N, temperature, sizes):
    """(N,) float32 log-probs of the targets, a chunk of rows at a time."""
    N, V = len(hidden_ND), len(weight_VD)
    logps_N, peak_N, log_sum_N = hidden_ND.new_empty(3, N, dtype=torch.float32)
    order_N = torch.arange(N, dtype=torch.int32, device=hidden_ND.device)
    buffer = hidden_ND.new_empty(min(N, sizes.chunk_rows), V, dtype=torch.float32)
    for first in range(0, N, sizes.chunk_rows):
        chunk = slice(first, min(N, first + sizes.chunk_rows))
        logits = matmul_float32(hidden_ND[chunk], weight_VD.T, out=buffer[: chunk.stop - first])
        row_kernel[(chunk.stop - first,)](
            logits, targets_N, order_N[chunk], logps_N, peak_N, log_sum_N,
            V, 1 / temperature, BLOCK=sizes.row_block, num_warps=8,
        )  # fmt: skip
    return logps_N
