"""The backward of all designs: what the forward has kept, else every logit computed once more.

With the log-sum-exp and the coefficients c_n = dLoss/dlogp_n known, the gradient of a logit needs
nothing but itself (eqs. 25, 26 of docs/equations.md, where they are derived):
    g_n(v) = c_n (1[v = y_n] - p_n(v)) / temperature,      dH = g W,      dW = gᵀ H.
Scaling a row commutes with both products: from kept rows P' = 1[v = y] - p, with s = c/temperature,
they are dH = s (P' W) and dW = P'ᵀ (s H). The other rows are computed a slice of the vocabulary at
a time. Slices write disjoint rows of dW and are added to dH in order: no atomics, the same bits
every time. Shape letters: `kernels/reference.py`; of the N rows the first K are kept.
"""

from types import ModuleType

import torch
from torch import Tensor

from kernels.chunked import matmul_float32


def words_of_slice(impl: str, rows: int, D: int = 0) -> int:
    """Words of the vocabulary in memory at once: in bf16, 6 bytes for each of the rows.

    chunked  2^27 / rows: 805 MB whatever N is. With dH in float32 (N D 4) 0.92 GB at N = 8,192 and
             1.28 GB at 32,768; the forward needs 1.26 GB (2,048 rows of logits and of hidden).
    fused    2^24 / rows: 101 MB, but at least 1,024 words, or adding to dH would cost more than the
             matmul. With dH 0.22 GB at N = 8,192 and 0.67 GB at 32,768; the forward 9 MB.
    plain    the same, in float32 67 MB.

    D  is passed if a slice of dW in float32, 4 D bytes a word, is held too
    A multiple of 256, because cuBLAS is slow on rows that start at odd addresses.
    """
    elements = 2**27 if impl == "chunked" else 2**24
    return max(1024, elements // (rows + D * 2 // 3) // 256 * 256)


def backward(
    coefficients_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor,
    statistics_3N: Tensor, order_N: Tensor, kept_KV: Tensor, needs_hidden: bool, needs_weight: bool,
    temperature: float, slice_words: int, steps: ModuleType,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(dH, dW) in the inputs' dtype; None, and no matmul, for the one that is not needed.

    Memory beyond outputs, in bytes: N D 4 for dH in float32, K D 6 for kept rows, and what
    `recompute` needs for the others.
    """
    (N, D), K, wide = hidden_ND.shape, len(kept_KV), statistics_3N.dtype
    dH = hidden_ND.new_zeros(N, D, dtype=wide) if needs_hidden else None
    dW = torch.empty_like(weight_VD) if needs_weight else None
    rest, scaled_KD = slice(None), hidden_ND[:0]  # a slice: nothing is copied
    if K:
        order_K, rest = order_N[:K], order_N[K:]
        scale_K1 = (coefficients_N[order_K] / temperature)[:, None]
        scaled_KD = (scale_K1 * hidden_ND[order_K]).to(hidden_ND.dtype)
        if needs_hidden:
            product_KD = matmul_float32(kept_KV, weight_VD, out=torch.empty_like(dH[:K]))
            dH[order_K] = product_KD.mul_(scale_K1)
    if K == N and needs_weight:
        torch.mm(kept_KV.T, scaled_KD, out=dW)
    if K < N:
        dH_RD = recompute(
            coefficients_N[rest], hidden_ND[rest], weight_VD, targets_N[rest],
            statistics_3N[:, rest], kept_KV, scaled_KD, needs_hidden, dW, temperature, slice_words,
            steps,
        )  # fmt: skip
        if needs_hidden:
            dH[rest] = dH_RD
    return dH if dH is None else dH.to(hidden_ND.dtype), dW


def recompute(
    coefficients_R: Tensor, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor,
    statistics_3R: Tensor, kept_KV: Tensor, scaled_KD: Tensor, needs_hidden: bool,
    dW: Tensor | None, temperature: float, slice_words: int, steps: ModuleType,
) -> Tensor | None:  # fmt: skip
    """dH of rows that were not kept, in float32. Fills dW, to which kept rows contribute too.

    Memory beyond outputs, in bytes: R slice_words 4 for the logits + R slice_words 2 for their bf16
    gradients (float32 gradients replace the logits in place), and with kept rows D slice_words 4
    for a slice of dW. A bf16 gradient could share the logits' memory too, but then a program would
    write where its own other threads still have to read.
    """
    (R, D), V, dtype = hidden_RD.shape, len(weight_VD), hidden_RD.dtype
    slice_words, wide = min(V, slice_words), statistics_3R.dtype
    buffer = hidden_RD.new_empty(R * slice_words, dtype=wide)
    gradients = buffer if dtype == wide else hidden_RD.new_empty(R * slice_words)
    dH_RD = hidden_RD.new_zeros(R, D, dtype=wide) if needs_hidden else None
    for first in range(0, V, slice_words):
        weight_SD = weight_VD[first : first + slice_words]
        words = len(weight_SD)
        logits_RS = matmul_float32(hidden_RD, weight_SD.T, out=buffer[: R * words].view(R, words))
        gradients_RS = gradients[: R * words].view(R, words)
        steps.softmax_gradient(
            logits_RS, gradients_RS, targets_R, statistics_3R, coefficients_R, first, temperature
        )
        if needs_hidden:
            matmul_float32(gradients_RS, weight_SD, out=dH_RD, beta=1.0)
        if dW is None:
            continue
        dW_SD = dW[first : first + words]
        if not len(kept_KV):
            torch.mm(gradients_RS.T, hidden_RD, out=dW_SD)
            continue
        # Added in float32, so that dW is rounded once.
        kept_KS = kept_KV[:, first : first + words]
        sum_SD = matmul_float32(kept_KS.T, scaled_KD, out=dW_SD.new_empty(words, D, dtype=wide))
        dW_SD.copy_(matmul_float32(gradients_RS.T, hidden_RD, out=sum_SD, beta=1.0))
    return dH_RD
