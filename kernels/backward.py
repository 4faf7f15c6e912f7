"""The backward both forwards share: one slice of the vocabulary at a time, every logit computed
once more.

With the log-sum-exp and the coefficients c_n = dLoss/dlogp_n known, the gradient of a logit needs
nothing but itself (eqs. 25, 26 of docs/equations.md, where they are derived):
    g_n(v) = c_n (1[v = y_n] - p_n(v)) / temperature,      dH += g W_slice,      dW_slice = gᵀ H.
Slices of the vocabulary write disjoint rows of dW and are added to dH in order: no atomics, the
same bits every time. Shape letters: `kernels/reference.py`.
"""

import torch
from torch import Tensor

from kernels.chunked import matmul_float32


def words_of_slice(impl: str, N: int) -> int:
    """Words of the vocabulary in memory at once: in bf16, 6 bytes for each of N rows.

    chunked  2^27 / N: 805 MB whatever N is. With dH in float32 (N D 4) 0.92 GB at N = 8,192 and
             1.28 GB at 32,768; the forward needs 1.26 GB (2,048 rows of logits and of hidden).
    fused    2^24 / N: 101 MB, but at least 1,024 words, or adding to dH would cost more than the
             matmul. With dH 0.22 GB at N = 8,192 and 0.67 GB at 32,768; the forward 9 MB.

    plain    the same, in float32 67 MB.

    A multiple of 256, because cuBLAS is slow on rows that start at odd addresses.
    """
    return max(1024, (2**27 if impl == "chunked" else 2**24) // N // 256 * 256)


def backward(
    coefficients_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor,
    statistics_3N: Tensor, needs_hidden: bool, needs_weight: bool, temperature: float,
    slice_words: int, steps,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(dH, dW) in the inputs' dtype; None, and no matmul, for the one that is not needed.

    Memory beyond outputs, in bytes: N slice_words 4 for the logits + N slice_words 2 for their bf16
    gradients (float32 gradients replace the logits in place) + N D 4 for dH in float32. A bf16
    gradient could share the logits' memory too, but then a program would write where its own other
    threads still have to read.
    """
    (N, D), V = hidden_ND.shape, len(weight_VD)
    slice_words = min(V, slice_words)
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    buffer = hidden_ND.new_empty(N * slice_words, dtype=wide)
    gradients = buffer if hidden_ND.dtype == wide else hidden_ND.new_empty(N * slice_words)
    dH = hidden_ND.new_zeros(N, D, dtype=wide) if needs_hidden else None
    dW = torch.empty_like(weight_VD) if needs_weight else None
    for first in range(0, V, slice_words):
        weight_SD = weight_VD[first : first + slice_words]
        words = len(weight_SD)
        logits_NS = matmul_float32(hidden_ND, weight_SD.T, out=buffer[: N * words].view(N, words))
        gradients_NS = gradients[: N * words].view(N, words)
        steps.softmax_gradient(
            logits_NS, gradients_NS, targets_N, statistics_3N, coefficients_N, first, temperature
        )
        if needs_hidden:
            matmul_float32(gradients_NS, weight_SD, out=dH, beta=1.0)
        if needs_weight:
            torch.mm(gradients_NS.T, hidden_ND, out=dW[first : first + words])
    return dH if dH is None else dH.to(hidden_ND.dtype), dW
