"""The small forward, and the one to read: the logits exist only in registers.

Two Triton matmuls over the vocabulary. The first keeps a running log-sum-exp of every token and picks its target's
logit; the second holds the G rows of each position in one tile and sums their spread. Nothing of size N x V is written.
Letters as in `kernels/reference.py`.

Words lie on the tile's first axis and tokens on its second, where the G rows of a position stand POSITIONS columns
apart (group-major): on tensor cores each thread then holds all G values of a word, and their mean needs no exchange.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.tiles import group_spread


@dataclass(frozen=True)
class Tile:
    """Shape of one matmul tile: words x tokens, in steps of `depth` along D."""

    words: int
    tokens: int
    depth: int
    warps: int
    stages: int


TILES = {
    torch.bfloat16: Tile(256, 128, 64, warps=8, stages=3),
    # float32 dots are exact ("ieee") and run outside the tensor cores: for checks, not for speed.
    torch.float32: Tile(64, 64, 32, warps=4, stages=2),
}
PROGRAMS = 4 * 132  # four waves of an H200's multiprocessors, so that the last, partly filled wave costs little


@triton.jit
def logits_tile(
    hidden_rows_ptr, weight_ptr, v, V, D,
    WORDS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """z = W h for WORDS words and TOKENS tokens, float32. Words past V read the last row; the caller masks them."""
    k = tl.arange(0, DEPTH)
    w_ptr = weight_ptr + tl.minimum(v, V - 1).to(tl.int64)[:, None] * D + k[None, :]
    h_ptr = hidden_rows_ptr[None, :] + k[:, None]
    z = tl.zeros([WORDS, TOKENS], tl.float32)
    for first in range(0, D, DEPTH):
        if EVEN_D:
            w, h = tl.load(w_ptr), tl.load(h_ptr)
        else:
            w = tl.load(w_ptr, (first + k < D)[None, :], other=0.0)
            h = tl.load(h_ptr, (first + k < D)[:, None], other=0.0)
        z = tl.dot(w, h, z, input_precision="ieee")  # z' = z + W[:, k] h[k]
        w_ptr += DEPTH
        h_ptr += DEPTH
    return z


@triton.jit
def log_sum_exp_kernel(
    hidden_ptr, weight_ptr, target_ptr, picked_ptr, partial_ptr, N, V, D, inverse_temperature, slice_tiles,
    WORDS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a slice of the vocabulary, and the target's logit: `reference.vocab_logps`.

    Grid: token tiles x slices; programs that run together read the same words.
    """
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    target = tl.load(target_ptr + n, n < N, other=-1)
    h_ptr = hidden_ptr + tl.minimum(n, N - 1).to(tl.int64) * D
    m = tl.full([TOKENS], float("-inf"), tl.float32)
    s = tl.zeros([TOKENS], tl.float32)
    first_tile = tl.program_id(1) * slice_tiles
    for tile in range(first_tile, tl.minimum(first_tile + slice_tiles, tl.cdiv(V, WORDS))):
        v = tile * WORDS + tl.arange(0, WORDS)
        x = logits_tile(h_ptr, weight_ptr, v, V, D, WORDS, TOKENS, DEPTH, EVEN_D) * inverse_temperature
        x = tl.where(v[:, None] < V, x, float("-inf"))
        # The one thread that holds the target's logit writes it.
        tl.store(picked_ptr + n[None, :] + 0 * v[:, None], x, v[:, None] == target[None, :])
        m_new = tl.maximum(m, tl.max(x, axis=0))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new[None, :]), axis=0)  # s' = s e^(m-m') + Σ e^(x-m')
        m = m_new
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * N + n, m + tl.log(s), n < N)


@triton.jit
def divergence_kernel(
    hidden_ptr, weight_ptr, lse_ptr, order_ptr, start_ptr, partial_ptr,
    first_t, last_t, V, D, T, G, log_V, inverse_temperature, slice_tiles,
    TEXTBOOK: tl.constexpr, UNIFORM: tl.constexpr, ROWS: tl.constexpr,
    WORDS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """One slice of the vocabulary of D_t for POSITIONS positions: `reference.group_divergence`.

    Grid: position tiles x slices. Column j of the tile is row j // POSITIONS of position j % POSITIONS.
    """
    POSITIONS: tl.constexpr = TOKENS // ROWS
    j = tl.arange(0, TOKENS)
    t = first_t + tl.program_id(0) * POSITIONS + j % POSITIONS
    start = tl.load(start_ptr + t, t < last_t, other=0)
    alive = j // POSITIONS < tl.load(start_ptr + t + 1, t < last_t, other=1) - start
    n = tl.load(order_ptr + start + j // POSITIONS, alive, other=0)
    lse = tl.load(lse_ptr + n, alive, other=0.0)
    h_ptr = hidden_ptr + n.to(tl.int64) * D
    alive = tl.reshape(alive, [1, ROWS, POSITIONS])

    t = first_t + tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    # Positions past the last one read token 0 as their only row: finite, and never stored.
    alive_count = tl.load(start_ptr + t + 1, t < last_t, other=1) - tl.load(start_ptr + t, t < last_t, other=0)
    ended = (G - alive_count).to(tl.float32) if UNIFORM else tl.zeros([POSITIONS], tl.float32)
    ended = tl.reshape(ended, [1, 1, POSITIONS])
    alive_count = tl.reshape(alive_count.to(tl.float32), [1, 1, POSITIONS])

    total = tl.zeros([POSITIONS], tl.float32)
    first_tile = tl.program_id(1) * slice_tiles
    for tile in range(first_tile, tl.minimum(first_tile + slice_tiles, tl.cdiv(V, WORDS))):
        v = tile * WORDS + tl.arange(0, WORDS)
        x = logits_tile(h_ptr, weight_ptr, v, V, D, WORDS, TOKENS, DEPTH, EVEN_D) * inverse_temperature
        logp = tl.reshape(x - lse[None, :], [WORDS, ROWS, POSITIONS])
        spread = group_spread(logp, alive, alive_count, ended, log_V, TEXTBOOK, AXIS=1)
        spread = tl.where((v < V)[:, None, None], spread, 0.0)
        total += tl.sum(tl.sum(spread, axis=1), axis=0)  # D' = D + Σ_v mean_i (e^d - d - 1)
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * T + t, total, t < last_t)


def slices_of_words(V: int, words: int, token_tiles: int) -> tuple[int, int]:
    """(slices, tiles in each): enough slices of the vocabulary to fill the GPU, none of them empty."""
    word_tiles = triton.cdiv(V, words)
    slice_tiles = triton.cdiv(word_tiles, min(word_tiles, triton.cdiv(PROGRAMS, token_tiles)))
    return triton.cdiv(word_tiles, slice_tiles), slice_tiles


def row_statistics(hidden_ND, weight_VD, targets_N, temperature, tile):
    """(logps_N, lse_N), float32."""
    (N, D), V = hidden_ND.shape, len(weight_VD)
    token_tiles = triton.cdiv(N, tile.tokens)
    slices, slice_tiles = slices_of_words(V, tile.words, token_tiles)
    picked_N = torch.empty(N, dtype=torch.float32, device=hidden_ND.device)
    partial_SN = torch.empty(slices, N, dtype=torch.float32, device=hidden_ND.device)
    log_sum_exp_kernel[(token_tiles, slices)](
        hidden_ND, weight_VD, targets_N, picked_N, partial_SN, N, V, D, 1 / temperature, slice_tiles,
        WORDS=tile.words, TOKENS=tile.tokens, DEPTH=tile.depth, EVEN_D=D % tile.depth == 0,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    lse_N = torch.logsumexp(partial_SN, 0)
    return picked_N - lse_N, lse_N


def buckets_of_positions(starts: list[int]):
    """Ranges (first, last, rows) of positions with more than rows / 2 and at most rows alive completions.

    Fewer and fewer completions are alive as t grows; a tile is padded to a power of two of them, never to all G.
    """
    first = 0
    for last in range(1, len(starts)):
        rows = triton.next_power_of_2(starts[last] - starts[last - 1])
        if last + 1 == len(starts) or triton.next_power_of_2(starts[last + 1] - starts[last]) != rows:
            yield first, last, rows
            first = last


def forward(hidden_ND, weight_VD, targets_N, rows, temperature, divergence, ended_rows, sizes):
    """(logps_N, lse_N, divergence_T), float32.

    Memory beyond outputs: the partial results of the slices, (slices N + slices T) 4 bytes: about 1 MB at any N.
    """
    tile = sizes.tile or TILES[hidden_ND.dtype]
    logps_N, lse_N = row_statistics(hidden_ND, weight_VD, targets_N, temperature, tile)
    V, D, T = *weight_VD.shape, len(rows.starts) - 1
    divergence_T = torch.empty(T, dtype=torch.float32, device=hidden_ND.device)
    for first, last, padded in buckets_of_positions(rows.starts):
        token_tiles = triton.cdiv(last - first, tile.tokens // padded)
        slices, slice_tiles = slices_of_words(V, tile.words, token_tiles)
        partial_ST = torch.empty(slices, T, dtype=torch.float32, device=hidden_ND.device)
        divergence_kernel[(token_tiles, slices)](
            hidden_ND, weight_VD, lse_N, rows.order_N, rows.start_T1, partial_ST,
            first, last, V, D, T, rows.G, math.log(V), 1 / temperature, slice_tiles,
            TEXTBOOK=divergence == "textbook", UNIFORM=ended_rows == "uniform", ROWS=padded,
            WORDS=tile.words, TOKENS=tile.tokens, DEPTH=tile.depth, EVEN_D=D % tile.depth == 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        divergence_T[first:last] = partial_ST[:, first:last].sum(0)
    return logps_N, lse_N, divergence_T


def token_logps(hidden_ND, weight_VD, targets_N, temperature, sizes):
    """(N,) float32 log-probs of the targets: the first kernel alone."""
    tile = sizes.tile or TILES[hidden_ND.dtype]
    return row_statistics(hidden_ND, weight_VD, targets_N, temperature, tile)[0]
