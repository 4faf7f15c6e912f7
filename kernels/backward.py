"""The kernels as one autograd function. All designs share this backward pass, which recomputes
every logit that the forward did not keep.

Given the log-sum-exp and the coefficients c_n = dLoss/dlogp_n, the gradient of a logit depends only
on that logit (eqs. 25, 26, derived in docs/equations.md):
    g_n(v) = c_n (1[v = y_n] - p_n(v)) / temperature,      dH = g W,      dW = gᵀ H.
Scaling a row commutes with both products. So for the first K rows, where the forward kept
P' = 1[v = y] - p, dH = s (P' W) and dW = P'ᵀ (s H) with s = c / temperature. Only one slice of
the vocabulary is in memory at a time. Slices write disjoint rows of dW and are added to dH in
order: no atomics, bit-identical results. Shape letters: `kernels/reference.py`.
"""

from importlib import import_module

import torch
from torch import Tensor

from kernels.chunked import Layout, matmul_float32
from kernels.reference import LossOptions

# Bytes of rows that a forward keeps: 4,110 rows in bf16 at V = 152064. Plain torch keeps less, so
# that on a CPU the head's memory stays near one copy of 512 rows of logits; "fused" never has
# logits in memory.
KEPT_BYTES = dict(chunked=1.25e9, plain=0.05e9, fused=0)
# Logits in memory at once in the backward, 6 bytes each in bf16: 805 MB and 101 MB. With dH in
# float32 (N D 4) and, beside kept rows, copies of hidden states and dH, chunked needs 1.04 GB at
# N = 8,192 and 1.75 GB at 32,768, its forward 1.26 GB (2,048 rows of logits and of hidden); fused
# needs 0.22 and 0.67 GB, its forward 9 MB.
SLICE_ELEMENTS = dict(chunked=2**27, plain=2**24, fused=2**24)


def words_of_slice(impl: str, N: int) -> int:
    """Vocabulary words in memory at once: at least 1,024, or accumulating dH would cost more than
    the matmul; a multiple of 256, because cuBLAS is slow on misaligned rows.
    """
    return max(1024, SLICE_ELEMENTS[impl] // N // 256 * 256)


class Statistics(torch.autograd.Function):
    """Eqs. 8 and 12 to 15 in the kernels: (logps_N, divergence_T), the latter without gradient."""

    @staticmethod
    def forward(
        ctx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        layout: Layout,
        impl: str,
        options: LossOptions,
        kept_share: float,
    ) -> tuple[Tensor, Tensor]:
        design = import_module("kernels.fused" if impl == "fused" else "kernels.chunked")
        steps = import_module("kernels.plain" if impl == "plain" else "kernels.logits")
        inputs = [x.contiguous() for x in (hidden_ND, weight_VD, targets_N)]
        N, V = len(hidden_ND), len(weight_VD)
        K = min(N, int(kept_share * KEPT_BYTES[impl] / hidden_ND.element_size() / V))
        kept_KV = hidden_ND.new_empty(K, V)
        statistics_3N, divergence_T = design.forward(*inputs, layout, options, steps, kept_KV)
        ctx.save_for_backward(*inputs, statistics_3N, layout.order_N, kept_KV)
        ctx.impl, ctx.temperature, ctx.steps = impl, options.temperature, steps
        ctx.mark_non_differentiable(divergence_T)
        return statistics_3N[0].clone(), divergence_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, coefficients_N: Tensor, _) -> tuple[Tensor | None, ...]:
        """(dH, dW) in the inputs' dtype; if one is not needed, None and no matmul.

        Memory beyond outputs, in bytes: N D 4 for dH in float32, a slice of N words 4 for logits +
        N words 2 for bf16 gradients (float32 gradients overwrite the logits), and with kept rows
        N D 2 each for the reordered hidden states, dH rounded, and dH back in its order. A bf16
        gradient could share the logits' memory too, but threads would overwrite logits that others
        in the same program have yet to read.
        """
        hidden_ND, weight_VD, targets_N, statistics_3N, order_N, kept_KV = ctx.saved_tensors
        (N, D), V, K, wide = hidden_ND.shape, len(weight_VD), len(kept_KV), statistics_3N.dtype
        order = order_N if K else slice(None)  # kept rows first; slice(None) avoids a copy
        rows_ND, coefficients_N = hidden_ND[order], coefficients_N[order].contiguous()
        scale_K1 = coefficients_N[:K, None] / ctx.temperature
        if K:
            rows_ND[:K] *= scale_K1
        others = targets_N[order][K:], statistics_3N[:, order][:, K:], coefficients_N[K:]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dH = hidden_ND.new_zeros(N, D, dtype=wide) if needs_hidden else None
        dW = torch.empty_like(weight_VD) if needs_weight else None
        size = V
        if K < N:
            size = min(V, words_of_slice(ctx.impl, N))
            logits = gradients = hidden_ND.new_empty(N * size)
            if logits.dtype != wide:
                logits = hidden_ND.new_empty(N * size, dtype=wide)

        for first in range(0, V, size):
            weight_SD = weight_VD[first : first + size]
            gradients_NS = kept_KS = kept_KV[:, first : first + size]
            if K < N:
                gradients_NS = gradients[: N * len(weight_SD)].view(N, -1)
                gradients_NS[:K] = kept_KS
                logits_RS = logits[: N * len(weight_SD)].view(N, -1)[K:]
                matmul_float32(rows_ND[K:], weight_SD.T, out=logits_RS)
                ctx.steps.softmax_gradient(
                    logits_RS, gradients_NS[K:], *others, first, ctx.temperature
                )
            if needs_hidden:
                matmul_float32(gradients_NS, weight_SD, out=dH, beta=1.0)
            if needs_weight:
                torch.mm(gradients_NS.T, rows_ND, out=dW[first : first + size])
        if needs_hidden:
            dH[:K] *= scale_K1
            dH = dH.to(hidden_ND.dtype)[order_N.argsort() if K else order]
        return dH, dW, None, None, None, None, None
