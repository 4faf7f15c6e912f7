"""The backward both forwards share: one slice of the vocabulary at a time, every logit computed
once more.

With the log-sum-exp and the coefficients c_n = dLoss/dlogp_n known, the gradient of a logit needs
nothing but itself (eqs. 25, 26 of docs/equations.md, where they are derived):
    g_n(v) = c_n (1[v = y_n] - p_n(v)) / temperature,      dH += g W_slice,      dW_slice = gᵀ H.
Slices of the vocabulary write disjoint rows of dW and are added to dH in order: no atomics, the
same bits every time. Letters as in `kernels/reference.py`.
"""

import torch
import triton
import triton.language as tl

from kernels.chunked import matmul_float32
from kernels.tiles import VIEWS


@triton.jit(do_not_specialize=["first_word"], do_not_specialize_on_alignment=VIEWS)
def softmax_gradient_kernel(
    logits_ptr, gradient_ptr, peak_ptr, log_sum_ptr, target_ptr, coefficient_ptr, upstream_ptr,
    first_word, words, inverse_temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits of a slice to their gradients, in place when both have one dtype.

    Grid: rows x blocks of words. Reference: what autograd derives from `reference.token_logps`.
    """
    n = tl.program_id(0).to(tl.int64)  # 64 bits: rows x words may pass 2^31
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + n * words + v, v < words, other=0.0) * inverse_temperature
    p = tl.exp(x - tl.load(peak_ptr + n) - tl.load(log_sum_ptr + n))  # p = e^(x-m) / Σ e^(x-m)
    hit = tl.where(first_word + v == tl.load(target_ptr + n), 1.0, 0.0)
    c = tl.load(coefficient_ptr + n) * tl.load(upstream_ptr).to(tl.float32) * inverse_temperature
    gradient = c * (hit - p)  # g = c (1[v=y] - p) / temperature
    tl.store(gradient_ptr + n * words + v, gradient.to(gradient_ptr.dtype.element_ty), v < words)


def add_matmul_float32(accumulator, a, b):
    """accumulator += a @ b, accumulator in float32."""
    if a.dtype == torch.float32:
        accumulator.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(accumulator, a, b, out_dtype=torch.float32, out=accumulator)
    else:
        accumulator.addmm_(a.float(), b.float())  # no such product on a CPU, where tests run


def backward(
    upstream, hidden_ND, weight_VD, targets_N, peak_N, log_sum_N, coefficients_N,
    temperature, needs_hidden, needs_weight, slice_words, block,
):  # fmt: skip
    """(dH, dW) in the inputs' dtype; None, and no matmul, for the one that is not needed.

    upstream  () gradient of the loss;  slice_words  words of the vocabulary at a time

    Memory beyond outputs, in bytes: N slice_words 4 for the logits + N slice_words 2 for their bf16
    gradients (float32 gradients replace the logits in place) + N D 4 for dH in float32. A bf16
    gradient could share the logits' memory too, but then a program would write where its own other
    threads still have to read.
    """
    (N, D), V = hidden_ND.shape, len(weight_VD)
    slice_words = min(V, slice_words)
    logits = torch.empty(N * slice_words, dtype=torch.float32, device=hidden_ND.device)
    in_place = hidden_ND.dtype == torch.float32
    gradients = logits if in_place else torch.empty_like(logits, dtype=hidden_ND.dtype)
    dH = torch.zeros(N, D, dtype=torch.float32, device=hidden_ND.device) if needs_hidden else None
    dW = torch.empty_like(weight_VD) if needs_weight else None
    for first in range(0, V, slice_words):
        weight = weight_VD[first : first + slice_words]
        words = len(weight)
        logits_NS = matmul_float32(hidden_ND, weight.T, out=logits[: N * words].view(N, words))
        gradients_NS = gradients[: N * words].view(N, words)
        softmax_gradient_kernel[(N, triton.cdiv(words, block))](
            logits_NS, gradients_NS, peak_N, log_sum_N, targets_N, coefficients_N, upstream,
            first, words, 1 / temperature, BLOCK=block, num_warps=4,
        )  # fmt: skip
        if needs_hidden:
            add_matmul_float32(dH, gradients_NS, weight)
        if needs_weight:
            torch.mm(gradients_NS.T, hidden_ND, out=dW[first : first + words])
    return dH if dH is None else dH.to(hidden_ND.dtype), dW
