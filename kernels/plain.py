"""The functions of `kernels/logits.py` in plain torch, for machines that cannot run Triton.

Shape letters: `kernels/reference.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.chunked import Layout
from kernels.reference import LossOptions

CHUNK_ELEMENTS = 3 * 2**21  # logits; 0.2 GB with the temporaries of `reference.group_divergence`


def row_statistics(logits_RV: Tensor, targets_R: Tensor, temperature: float) -> Tensor:
    """See `logits.row_statistics`."""
    x_RV = logits_RV / temperature
    peak_R = x_RV.amax(1)
    logps_RV = F.log_softmax(x_RV, dim=-1)
    log_sum_R = -logps_RV.amax(1)  # at the peak, log p = -log Σ e^(x-m)
    return torch.stack([logps_RV.gather(1, targets_R[:, None])[:, 0], peak_R, log_sum_R])


def divergence(
    logits_RV: Tensor, statistics_3R: Tensor, layout: Layout, span: range, options: LossOptions
) -> Tensor:
    """See `logits.divergence`."""
    _, peak_R1, log_sum_R1 = statistics_3R[..., None]
    logps_RV = logits_RV / options.temperature - peak_R1 - log_sum_R1
    lengths_G = layout.lengths_G - span.start
    alive_TG = torch.arange(len(span), device=logps_RV.device)[:, None] < lengths_G
    # In the textbook form, terms cancel where rows are nearly equal, so sum it in float64.
    wide = torch.float64 if options.form == "textbook" else logps_RV.dtype
    rows_GTV = logps_RV.new_zeros(layout.G, len(span), logits_RV.shape[1], dtype=wide)
    rows_GTV.transpose(0, 1)[alive_TG] = logps_RV.to(wide)  # the chunk is position-major
    del logps_RV
    return reference.group_divergence(rows_GTV, lengths_G, options.form, options.ended_rows)


def softmax_gradient(
    logits_NS: Tensor,
    out_NS: Tensor,
    targets_N: Tensor,
    statistics_3N: Tensor,
    coefficients_N: Tensor,
    first_word: int,
    temperature: float,
) -> None:
    """See `logits.softmax_gradient`; overwrites the logits."""
    _, peak_N1, log_sum_N1 = statistics_3N[..., None]
    scale_N = coefficients_N / temperature
    p_NS = logits_NS.div_(temperature).sub_(peak_N1).sub_(log_sum_N1).exp_()
    gradient_NS = p_NS.mul_(-scale_N[:, None])
    here_N = (targets_N >= first_word) & (targets_N < first_word + logits_NS.shape[1])
    n = here_N.nonzero()[:, 0]
    gradient_NS[n, targets_N[n] - first_word] += scale_N[n]
    if out_NS.data_ptr() != logits_NS.data_ptr():
        out_NS.copy_(gradient_NS)
