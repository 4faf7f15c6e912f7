"""The fused forward, the smaller and more readable one: logits exist only in registers.

Two Triton matmuls over the vocabulary. The first keeps a running log-sum-exp per token and picks
out the target's logit; the second holds the G rows of each position in one tile and sums their
spread. Nothing of size N x V is written. Shape letters: `kernels/reference.py`.

In the second, words are the tile's first axis and tokens its second, with the G rows of a position
POSITIONS columns apart (group-major). On tensor cores each thread then holds all G values of a
word, and their mean needs no communication.
"""

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.chunked import Layout
from kernels.reference import LossOptions
from kernels.tiles import VIEWS, group_spread

# (words, tokens) in bf16 by the GPU's major compute capability: the largest tile whose accumulator
# and group arithmetic fit in registers without spilling (`python -m kernels.compile_check` prints
# the counts). Blackwell's tensor memory gives each thread a whole row of the tile, hence fewer
# tokens there. Speed on a GPU: not yet measured.
TILES = {8: (128, 128), 9: (256, 128), 10: (128, 64)}
MULTIPROCESSORS = 132  # an H200's; on other GPUs the slices below are valid but less balanced


@triton.jit
def matmul_tile(a_rows_ptr, b_rows_ptr, z, D, DEPTH: tl.constexpr, EVEN_D: tl.constexpr):
    """z + A Bᵀ in float32, for the rows of A and B given by two vectors of row pointers."""
    k = tl.arange(0, DEPTH)
    a_ptr = a_rows_ptr[:, None] + k[None, :]
    b_ptr = b_rows_ptr[None, :] + k[:, None]
    for first in range(0, D, DEPTH):
        if EVEN_D:
            a, b = tl.load(a_ptr), tl.load(b_ptr)
        else:
            a = tl.load(a_ptr, (first + k < D)[None, :], other=0.0)
            b = tl.load(b_ptr, (first + k < D)[:, None], other=0.0)
        z = tl.dot(a, b, z, input_precision="ieee")  # z' = z + A[:, k] B[:, k]ᵀ
        a_ptr += DEPTH
        b_ptr += DEPTH
    return z


@triton.jit
def rows_at(matrix_ptr, row, rows, D):
    """Pointers to rows of a (rows, D) matrix, clamped to the last row; the caller masks the rest.

    64-bit, because rows x D may exceed 2^31.
    """
    return matrix_ptr + tl.minimum(row, rows - 1).to(tl.int64) * D


@triton.jit(do_not_specialize=["N", "slice_tiles"], do_not_specialize_on_alignment=VIEWS)
def log_sum_exp_kernel(
    hidden_ptr, weight_ptr, target_ptr, picked_ptr, peak_ptr, sum_ptr,
    N, V, D, inverse_temperature, slice_tiles,
    WORDS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Eq. 21: log-sum-exp over a vocabulary slice, and the target's logit.

    Grid: token tiles x slices; programs that run together read the same words. Here tokens are the
    tile's first axis, which keeps running statistics small: two tokens per thread.
    """
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    target = tl.load(target_ptr + n, n < N, other=-1).to(tl.int32)
    hidden_rows_ptr = rows_at(hidden_ptr, n, N, D)
    m = tl.full([TOKENS], float("-inf"), tl.float32)
    s = tl.zeros([TOKENS], tl.float32)
    picked = tl.zeros([TOKENS], tl.float32)
    first_tile = tl.program_id(1) * slice_tiles
    for tile in range(first_tile, tl.minimum(first_tile + slice_tiles, tl.cdiv(V, WORDS))):
        v = tile * WORDS + tl.arange(0, WORDS)
        z = tl.zeros([TOKENS, WORDS], tl.float32)
        z = matmul_tile(hidden_rows_ptr, rows_at(weight_ptr, v, V, D), z, D, DEPTH, EVEN_D)
        x = tl.where(v[None, :] < V, z * inverse_temperature, float("-inf"))
        picked += tl.sum(tl.where(v[None, :] == target[:, None], x, 0.0), axis=1)
        m_new = tl.maximum(m, tl.max(x, axis=1))
        # s' = s e^(m-m') + Σ e^(x-m')
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new[:, None]), axis=1)
        m = m_new
    tl.store(peak_ptr + tl.program_id(1).to(tl.int64) * N + n, m, n < N)
    tl.store(sum_ptr + tl.program_id(1).to(tl.int64) * N + n, s, n < N)
    here = (target >= first_tile * WORDS) & (target < (first_tile + slice_tiles) * WORDS)
    tl.store(picked_ptr + n, picked, here)  # only the slice that contains the target writes


@triton.jit(do_not_specialize=["first_t", "last_t", "T", "G", "slice_tiles"])
def divergence_kernel(
    hidden_ptr, weight_ptr, lse_ptr, order_ptr, start_ptr, partial_ptr,
    first_t, last_t, V, D, T, G, log_V, inverse_temperature, slice_tiles,
    FORM: tl.constexpr, UNIFORM: tl.constexpr, ROWS: tl.constexpr,
    WORDS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Eqs. 14, 15: one vocabulary slice's part of D_t, for POSITIONS positions.

    Grid: position tiles x slices. Column j is row j // POSITIONS of position j % POSITIONS.
    """
    POSITIONS: tl.constexpr = TOKENS // ROWS
    j = tl.arange(0, TOKENS)
    t = first_t + tl.program_id(0) * POSITIONS + j % POSITIONS
    start = tl.load(start_ptr + t, t < last_t, other=0)
    exists = j // POSITIONS < tl.load(start_ptr + t + 1, t < last_t, other=1) - start
    n = tl.load(order_ptr + start + j // POSITIONS, exists, other=0)
    lse = tl.load(lse_ptr + n)
    hidden_rows_ptr = hidden_ptr + n.to(tl.int64) * D

    t = first_t + tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    # Positions past the last one read token 0 as their only row: finite and never stored.
    alive_count = tl.load(start_ptr + t + 1, t < last_t, other=1)
    alive_count -= tl.load(start_ptr + t, t < last_t, other=0)
    ended = (G - alive_count).to(tl.float32) if UNIFORM else tl.zeros([POSITIONS], tl.float32)
    ended = tl.reshape(ended, [1, 1, POSITIONS])
    alive_count = tl.reshape(alive_count.to(tl.float32), [1, 1, POSITIONS])

    total = tl.zeros([POSITIONS], tl.float32)
    first_tile = tl.program_id(1) * slice_tiles
    for tile in range(first_tile, tl.minimum(first_tile + slice_tiles, tl.cdiv(V, WORDS))):
        v = tile * WORDS + tl.arange(0, WORDS)
        z = tl.zeros([WORDS, TOKENS], tl.float32)
        z = matmul_tile(rows_at(weight_ptr, v, V, D), hidden_rows_ptr, z, D, DEPTH, EVEN_D)
        logp = tl.reshape(z * inverse_temperature - lse[None, :], [WORDS, ROWS, POSITIONS])
        alive = tl.arange(0, ROWS)[None, :, None] < alive_count
        spread = group_spread(logp, alive, alive_count, ended, log_V, FORM, AXIS=1)
        spread = tl.where((v < V)[:, None, None], spread, 0.0)
        total += tl.sum(tl.sum(spread, axis=1), axis=0)  # D' = D + Σ_v mean_i (e^d - d - 1)
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * T + t, total, t < last_t)


def tile_for(hidden_ND: Tensor) -> dict[str, int]:
    """Constants of a matmul tile: words x tokens, in steps of DEPTH along D."""
    words, tokens, depth, stages = 64, 64, 32, 2
    if hidden_ND.dtype != torch.float32:  # float32 dots are exact but slow: no tensor cores
        major, _ = torch.cuda.get_device_capability(hidden_ND.device)
        (words, tokens), depth, stages = TILES.get(major, TILES[8]), 64, 3
    even = hidden_ND.shape[1] % depth == 0
    tile = dict(WORDS=words, TOKENS=tokens, DEPTH=depth, EVEN_D=even)
    return tile | dict(num_warps=8, num_stages=stages)


def divergence_tile(tile: dict[str, int], rows: int, official: bool) -> dict[str, int]:
    """The tile for groups of `rows` rows, tuned so that nothing spills.

    Holds as many positions as `tile` would with eight rows, so that the per-position state of a
    thread stays the same; fewer with more rows. Half the words where there is more state.
    """
    words, tokens = tile["WORDS"], tile["TOKENS"]
    tokens = rows * tokens // 8 if rows <= 8 else max(tokens, rows)
    words = words if official and rows <= 8 else words // 2
    return tile | dict(WORDS=words, TOKENS=max(16, tokens))  # 16: the minimum of tl.dot


def slices_of_words(V: int, words: int, token_tiles: int) -> tuple[int, int]:
    """(slices, word tiles per slice): splits the vocabulary to keep all multiprocessors busy.

    Programs run in waves of one per multiprocessor, so a split takes as long as its waves times
    its tiles. No slice is empty.
    """
    word_tiles = triton.cdiv(V, words)

    def waves_times_tiles(slices: int) -> int:
        waves = triton.cdiv(slices * token_tiles, MULTIPROCESSORS)
        return waves * triton.cdiv(word_tiles, slices)

    slices = min(range(1, min(word_tiles, 64) + 1), key=waves_times_tiles)
    slice_tiles = triton.cdiv(word_tiles, slices)
    return triton.cdiv(word_tiles, slice_tiles), slice_tiles


def row_statistics(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    temperature: float,
    tile: dict[str, int],
) -> Tensor:
    """(3, N) float32: see `logits.row_statistics`."""
    (N, D), V = hidden_ND.shape, len(weight_VD)
    token_tiles = triton.cdiv(N, tile["TOKENS"])
    slices, slice_tiles = slices_of_words(V, tile["WORDS"], token_tiles)
    picked_N = hidden_ND.new_empty(N, dtype=torch.float32)
    peak_SN, sum_SN = hidden_ND.new_empty(2, slices, N, dtype=torch.float32)
    log_sum_exp_kernel[(token_tiles, slices)](
        hidden_ND, weight_VD, targets_N, picked_N, peak_SN, sum_SN,
        N, V, D, 1 / temperature, slice_tiles, **tile,
    )  # fmt: skip
    peak_N = peak_SN.amax(0)
    log_sum_N = (sum_SN * (peak_SN - peak_N).exp()).sum(0).log()
    return torch.stack([picked_N - peak_N - log_sum_N, peak_N, log_sum_N])


def forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    layout: Layout,
    options: LossOptions,
    *_,
) -> tuple[Tensor, Tensor]:
    """(statistics_3N, divergence_T): see `chunked.forward`.

    Ever fewer completions are alive as t grows. So that not every position is padded to G, there
    is one launch per power of two `rows`, for positions with rows / 2 < alive <= rows.
    Memory beyond outputs: partial results, slices (2 N + T) 4 bytes, 9 MB at N = 32,768.
    """
    tile, V, D, T = tile_for(hidden_ND), *weight_VD.shape, len(layout.starts) - 1
    statistics_3N = row_statistics(hidden_ND, weight_VD, targets_N, options.temperature, tile)
    divergence_T, last = statistics_3N.new_zeros(T), 0
    if layout.G == 1 and options.form != "entropy":  # a single completion has no spread
        return statistics_3N, divergence_T
    alive = [end - start for start, end in itertools.pairwise(layout.starts)]
    for rows, positions in itertools.groupby(alive, key=triton.next_power_of_2):
        first, last = last, last + len(list(positions))
        narrow = divergence_tile(tile, rows, options.form == "official")
        token_tiles = triton.cdiv(last - first, narrow["TOKENS"] // rows)
        slices, slice_tiles = slices_of_words(V, narrow["WORDS"], token_tiles)
        partial_ST = hidden_ND.new_empty(slices, T, dtype=torch.float32)
        divergence_kernel[(token_tiles, slices)](
            hidden_ND, weight_VD, statistics_3N[1:].sum(0), layout.order_N, layout.start_of_t,
            partial_ST, first, last, V, D, T, layout.G, math.log(V), 1 / options.temperature,
            slice_tiles, FORM=options.form, UNIFORM=options.ended_rows == "uniform", ROWS=rows,
            **narrow,
        )  # fmt: skip
        divergence_T[first:last] = partial_ST[:, first:last].sum(0)
    return statistics_3N, divergence_T
