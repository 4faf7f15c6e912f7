"""Attention for one decoding step, including rotary embedding and the KV cache write.

Each of R = B G rows adds one new token. It attends to its question's prompt, which the G rows
share, and to its own completion up to itself. Two kernels per layer:

    prompt_kernel   multiplies a piece of the prompt's keys with the G rows and all query heads that
                    share the key head, in one product, so a prompt is read once per question
    join_kernel     for each row and key head: writes the new key and value, attends over the row's
                    own completion, and merges the partial results of the prompt pieces

A single kernel would need a counter, reset every step, to let the last program do the merge. A
second launch inside a CUDA graph takes 1 to 2 us, in 28 layers 1 % of the time it takes to read
the weights of 7B (estimated, not measured). The completion itself is not split into pieces: a few
hundred tokens are only a few blocks.

Shape letters: B questions, G completions of each, R = B G rows, P prompt tokens, T tokens of a
completion, H query heads, K key heads, each shared by H / K query heads, D head size. The position
t is read on the device and no shape depends on it, so a CUDA graph can be captured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # keys per load
MOST_ROWS = 128  # per product; more would not fit in registers
MULTIPROCESSORS = 132  # an H200's; on other GPUs the pieces below are valid but less balanced


@triton.jit
def rotated(x_ptr, row, cos_ptr, sin_ptr, table_row, exists, D: tl.constexpr, HEAD: tl.constexpr):
    """Rotary embedding of rows of x, (rows, HEAD) float32; 0 for rows that do not exist."""
    j = tl.arange(0, HEAD)[None, :]
    exists = exists & (j < D)
    other = tl.where(j < D // 2, j + D // 2, j - D // 2)
    x = tl.load(x_ptr + row * D + j, exists, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + row * D + other, exists, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + table_row * D + j, exists, other=0.0)
    sin = tl.load(sin_ptr + table_row * D + j, exists, other=0.0)
    return x * cos + tl.where(j < D // 2, -y, y) * sin  # features j and j + D/2 rotate as a pair


@triton.jit
def attend(
    q, key_ptr, value_ptr, first, last, m, s, o, scale,
    D: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eq. 35 over keys first to last: peak m, sum s and weighted values o of each row of q."""
    j = tl.arange(0, HEAD)[None, :]
    for begin in range(first, last, BLOCK):
        n = begin + tl.arange(0, BLOCK)[:, None]
        exists = (n < last) & (j < D)
        k = tl.load(key_ptr + n * D + j, exists, other=0.0)
        v = tl.load(value_ptr + n * D + j, exists, other=0.0)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        x = tl.where(tl.trans(n) < last, x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, axis=1))
        p = tl.exp(x - m_new[:, None])
        shrink = tl.exp(m - m_new)
        s = s * shrink + tl.sum(p, axis=1)  # s' = s e^(m-m') + Σ e^(x-m')
        o = o * shrink[:, None]  # o' = o e^(m-m') + Σ e^(x-m') v
        o = tl.dot(p.to(v.dtype), v, o, input_precision="ieee")
        m = m_new
    return m, s, o


@triton.jit(do_not_specialize=["G", "K", "shared", "P", "piece"])
def prompt_kernel(
    query_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, length_ptr, peak_ptr, sum_ptr, partial_ptr,
    G, K, shared, P, piece, scale,
    ROWS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eq. 35 for one piece of a prompt. Grid: questions x key heads; pieces; blocks of rows."""
    b, h = tl.program_id(0) // K, tl.program_id(0) % K
    i = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    exists = i < G * shared
    r = b * G + i // shared
    row = (r * K + h) * shared + i % shared  # of (R, H)
    q = rotated(query_ptr, row[:, None], cos_ptr, sin_ptr, r[:, None], exists[:, None], D, HEAD).to(
        key_ptr.dtype.element_ty
    )

    first = tl.program_id(1) * piece
    last = tl.minimum(first + piece, tl.load(length_ptr + b)).to(tl.int32)
    start = tl.program_id(0).to(tl.int64) * P * D
    m = tl.full([ROWS], float("-inf"), tl.float32)  # stays -inf if the prompt ends before here
    s = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, HEAD], tl.float32)
    m, s, o = attend(
        q, key_ptr + start, value_ptr + start, first, last, m, s, o, scale, D, HEAD, BLOCK
    )
    row += tl.program_id(1) * tl.num_programs(0) * G * shared
    tl.store(peak_ptr + row, m, exists)
    tl.store(sum_ptr + row, s, exists)
    j = tl.arange(0, HEAD)[None, :]
    tl.store(partial_ptr + row[:, None] * D + j, o, exists[:, None] & (j < D))


@triton.jit(do_not_specialize=["K", "shared", "T", "pieces"])
def join_kernel(
    query_ptr, new_key_ptr, new_value_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, t_ptr,
    peak_ptr, sum_ptr, partial_ptr, out_ptr, K, shared, T, pieces, scale,
    ROWS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Eq. 35 for the new token, its completion and the prompt pieces. Grid: rows x key heads."""
    i, j = tl.arange(0, ROWS), tl.arange(0, HEAD)[None, :]
    r, there = tl.program_id(0) // K, j < D
    exists = i < shared
    row = tl.program_id(0) * shared + i
    q = rotated(query_ptr, row[:, None], cos_ptr, sin_ptr, r, exists[:, None], D, HEAD)
    q = q.to(key_ptr.dtype.element_ty)
    k = rotated(new_key_ptr, tl.program_id(0), cos_ptr, sin_ptr, r, there, D, HEAD)
    k = k.to(key_ptr.dtype.element_ty)
    v = tl.load(new_value_ptr + tl.program_id(0) * D + j, there, other=0.0)
    t = tl.load(t_ptr).to(tl.int32)
    start = tl.program_id(0).to(tl.int64) * T * D
    tl.store(key_ptr + start + t * D + j, k, there)
    tl.store(value_ptr + start + t * D + j, v, there)

    m = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * scale  # the new token attends itself
    s = tl.full([ROWS], 1.0, tl.float32)
    o = tl.zeros([ROWS, HEAD], tl.float32) + v.to(tl.float32)
    m, s, o = attend(q, key_ptr + start, value_ptr + start, 0, t, m, s, o, scale, D, HEAD, BLOCK)
    for _ in range(pieces):
        m_piece = tl.load(peak_ptr + row, exists, other=float("-inf"))
        s_piece = tl.load(sum_ptr + row, exists, other=0.0)
        o_piece = tl.load(partial_ptr + row[:, None] * D + j, exists[:, None] & there, other=0.0)
        m_new = tl.maximum(m, m_piece)
        shrink, shrink_piece = tl.exp(m - m_new), tl.exp(m_piece - m_new)
        s = s * shrink + s_piece * shrink_piece  # (m, s, o) ⊕ (m, s, o) of the piece
        o = o * shrink[:, None] + o_piece * shrink_piece[:, None]
        m = m_new
        row += tl.num_programs(0) * shared
    row = tl.program_id(0) * shared + i
    tl.store(out_ptr + row[:, None] * D + j, o / s[:, None], exists[:, None] & there)


def launch(
    query_RHD: Tensor,
    key_RKD: Tensor,
    value_RKD: Tensor,
    cos_RD: Tensor,
    sin_RD: Tensor,
    prompt_key_BKPD: Tensor,
    prompt_value_BKPD: Tensor,
    lengths_B: Tensor,
    own_key_RKTD: Tensor,
    own_value_RKTD: Tensor,
    t: Tensor,
    scale: float,
) -> Tensor:
    """(R, H, D) in the cache's dtype; see `model.rollout.group_attention` for the arguments.

    All tensors are contiguous. Writes the rotated new key and the new value at position t of the
    row's own cache; never reads beyond t, or beyond a prompt's length. Inputs are float32 or
    bfloat16; products are in the cache's dtype, accumulated in float32; softmax is in float32.
    """
    (R, H, D), (B, K, P, _), T = query_RHD.shape, prompt_key_BKPD.shape, own_key_RKTD.shape[2]
    G, shared = R // B, H // K
    rows = min(max(16, triton.next_power_of_2(G * shared)), MOST_ROWS)
    piece = BLOCK * triton.cdiv(triton.cdiv(P, BLOCK) * B * K, MULTIPROCESSORS)
    pieces = triton.cdiv(P, piece)
    peak, total = (query_RHD.new_empty(pieces, R, H, dtype=torch.float32) for _ in range(2))
    parts = (peak, total, query_RHD.new_empty(pieces, R, H, D, dtype=torch.float32))
    out_RHD = own_value_RKTD.new_empty(R, H, D)
    rotation, own = (cos_RD, sin_RD), (own_key_RKTD, own_value_RKTD, t)
    options = dict(D=D, HEAD=max(16, triton.next_power_of_2(D)), BLOCK=BLOCK, num_stages=2)

    prompt = (prompt_key_BKPD, prompt_value_BKPD, lengths_B)
    sizes, warps = (G, K, shared, P, piece), 8 if rows > 64 else 4
    prompt_kernel[(B * K, pieces, triton.cdiv(G * shared, rows))](
        query_RHD, *rotation, *prompt, *parts, *sizes, scale, ROWS=rows, num_warps=warps, **options
    )
    new = (query_RHD, key_RKD, value_RKD)
    sizes, rows = (K, shared, T, pieces), max(16, triton.next_power_of_2(shared))
    join_kernel[(R * K,)](
        *new, *rotation, *own, *parts, out_RHD, *sizes, scale, ROWS=rows, num_warps=4, **options
    )
    return out_RHD


# Registered as an operator so that fake tensors work and it counts as one operator.
decode_attention = torch.library.custom_op(
    "twgrpo::decode_attention", launch, mutates_args=("own_key_RKTD", "own_value_RKTD")
)


@decode_attention.register_fake
def shape_only(query_RHD: Tensor, key_RKD: Tensor, value_RKD: Tensor, *_) -> Tensor:
    return value_RKD.new_empty(query_RHD.shape)
