"""The chunked forward pass: torch (cuBLAS on a GPU) computes the logits of a chunk of positions,
and Triton or plain torch does the rest while the chunk is in memory.

Recomputing a logit costs D = 3584 multiplications, reading it back one access. So on a GPU a chunk
of at most 2,048 rows is written once in float32 and read twice: by rows for the log-sum-exp, by
groups for the divergence. Shape letters: `kernels/reference.py`.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.reference import LossOptions


@dataclass(frozen=True)
class Layout:
    """The N tokens in position-major order: all of position 0, then position 1, ...

    This makes the alive rows of a position adjacent.
    """

    G: int
    lengths_G: Tensor  # (G,) int64
    starts: list[int]  # T + 1 numbers: position t owns rows starts[t] .. starts[t + 1]
    start_of_t: Tensor  # (T + 1,) int32, the same on the device
    order_N: Tensor  # (N,) int32: the token of each row


def lay_out(lengths: list[int], device: torch.device | str) -> Layout:
    """Computes the layout on the host, to avoid a GPU synchronisation."""
    lengths_G = torch.tensor(lengths)
    _, position_N = reference.positions_of_tokens(lengths_G)
    order_N = torch.argsort(position_N, stable=True)
    starts = F.pad(torch.bincount(position_N).cumsum(0), (1, 0))
    tables = (lengths_G, starts.to(torch.int32), order_N.to(torch.int32))
    lengths_G, *tables = (x.to(device, non_blocking=True) for x in tables)
    return Layout(len(lengths), lengths_G, starts.tolist(), *tables)


def matmul_float32(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0) -> Tensor:
    """out = a @ b + beta out, with out in float32 (float64 for float64 inputs).

    Rounding the logits to bf16 instead changes D by a relative 3.5e-3 (measured at V = 152064).
    """
    if a.dtype != out.dtype and a.is_cuda:
        return torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def forward(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, layout: Layout,
    options: LossOptions, steps: ModuleType, kept_KV: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(statistics_3N, divergence_T), in float32 or wider. The statistics of each token are its
    target's log-prob, its row's peak and log Σ e^(x-peak); divergence_T is D_t.

    steps    the module `logits` (Triton) or `plain` (torch)
    kept_KV  is filled with P' = 1[v=y] - p for the first K rows in position-major order

    Memory beyond outputs: one chunk of logits, 2048 x 152064 x 4 = 1.25 GB for any N; in plain
    torch 41 rows and about 7 copies of them, 0.2 GB.
    """
    starts, T, V = layout.starts, len(layout.starts) - 1, len(weight_VD)
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    statistics_3N = hidden_ND.new_empty(3, len(hidden_ND), dtype=wide)
    divergence_T = hidden_ND.new_zeros(T, dtype=wide)
    # Budget G rows per position, as if all completions were alive.
    positions = max(1, steps.CHUNK_ELEMENTS // (V * layout.G))
    buffer = hidden_ND.new_empty(starts[min(positions, T)], V, dtype=wide)
    for first in range(0, T, positions):
        span = range(first, min(first + positions, T))
        rows = slice(starts[first], starts[span.stop])
        order_R = layout.order_N[rows]
        logits_RV = matmul_float32(hidden_ND[order_R], weight_VD.T, out=buffer[: len(order_R)])
        targets_R, kept_V = targets_N[order_R], kept_KV[rows]
        statistics_3R = steps.row_statistics(logits_RV, targets_R, options.temperature)
        statistics_3N[:, order_R] = statistics_3R
        if layout.G > 1 or options.form == "entropy":  # a single completion has no spread
            divergence_T[span.start : span.stop] = steps.divergence(
                logits_RV, statistics_3R, layout, span, options
            )
        if K := len(kept_V):
            # This reads the chunk once more, a thirtieth of the time of three matmuls. The group
            # kernel could write it instead, but bf16 stores and float32 loads want different tile
            # layouts, and converting costs 12 barriers per tile.
            no_scale_K = torch.full_like(statistics_3R[0, :K], options.temperature)
            steps.softmax_gradient(
                logits_RV[:K], kept_V, targets_R[:K], statistics_3R[:, :K], no_scale_K, 0,
                options.temperature,
            )  # fmt: skip
    return statistics_3N, divergence_T
