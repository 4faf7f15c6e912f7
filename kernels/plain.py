"""The functions of `kernels/logits.py` in plain torch, for machines on which Triton cannot run.

Shape letters: `kernels/reference.py`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.chunked import Layout, chunks_of_positions
from kernels.reference import LossOptions

CHUNK_ELEMENTS = 3 * 2**21  # logits: with what `reference.group_divergence` makes of them, 0.2 GB


def chunks(layout: Layout, V: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions, each counted as G rows, because ended rows are laid out too."""
    return chunks_of_positions(
        range(0, layout.G * len(layout.starts), layout.G), CHUNK_ELEMENTS // V
    )


def statistics(
    logits_RV: Tensor,
    targets_R: Tensor,
    layout: Layout,
    first: int,
    last: int,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """As `logits.statistics`."""
    logps_RV = logits_RV / options.temperature
    peak_R = logps_RV.amax(1)
    logps_RV = F.log_softmax(logps_RV, dim=-1)
    log_sum_R = -logps_RV.amax(1)  # at the peak, log p = -log Σ e^(x-m)
    statistics_3R = torch.stack([logps_RV.gather(1, targets_R[:, None])[:, 0], peak_R, log_sum_R])
    if layout.G == 1 and options.form != "entropy":  # one alone has no spread
        return statistics_3R, peak_R.new_zeros(last - first)
    alive_TG = torch.arange(first, last, device=peak_R.device)[:, None] < layout.lengths_G
    # The terms of the textbook form cancel where rows are nearly equal: sum those in float64.
    wide = torch.float64 if options.form == "textbook" else logps_RV.dtype
    rows_GTV = logps_RV.new_zeros(layout.G, last - first, logits_RV.shape[1], dtype=wide)
    rows_GTV.transpose(0, 1)[alive_TG] = logps_RV.to(wide)  # the chunk is position-major
    del logps_RV
    divergence_T = reference.group_divergence(
        rows_GTV, layout.lengths_G - first, options.form, options.ended_rows
    )
    return statistics_3R, divergence_T


def softmax_gradient(
    logits_NS: Tensor,
    out_NS: Tensor,
    targets_N: Tensor,
    statistics_3N: Tensor,
    coefficients_N: Tensor,
    first_word: int,
    temperature: float,
) -> None:
    """As `logits.softmax_gradient`; overwrites the logits."""
    _, peak_N1, log_sum_N1 = statistics_3N[..., None]
    scale_N = coefficients_N / temperature
    p_NS = logits_NS.div_(temperature).sub_(peak_N1).sub_(log_sum_N1).exp_()
    gradient_NS = p_NS.mul_(-scale_N[:, None])
    here_N = (targets_N >= first_word) & (targets_N < first_word + logits_NS.shape[1])
    n = here_N.nonzero()[:, 0]
    gradient_NS[n, targets_N[n] - first_word] += scale_N[n]
    if out_NS.data_ptr() != logits_NS.data_ptr():
        out_NS.copy_(gradient_NS)
