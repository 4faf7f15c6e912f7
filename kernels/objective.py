"""Weights, ratio, clip, k3, loss and the loss's derivative by each log-prob (eqs. 9 to 11, 16 to 19
and 24 of docs/equations.md): one small Triton kernel.

Letters as in `kernels/reference.py`. Reference: `token_weights`, `clipped_objective`, `k3_kl`,
`token_coefficients`.
"""

import torch
import triton
import triton.language as tl

from kernels.tiles import NAN_STAYS, VIEWS, clamp_log_ratio, k3


@triton.jit(do_not_specialize=["N", "T", "G"], do_not_specialize_on_alignment=VIEWS)
def objective_kernel(
    divergence_ptr, logp_ptr, old_ptr, ref_ptr,
    completion_ptr, position_ptr, length_ptr, advantage_ptr,
    token_weight_ptr, coefficient_ptr, summary_ptr,
    N, T, G, alpha, eps_low, eps_high, beta,
    TOKEN_WEIGHTS: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program does it all: on a few vectors of N numbers a fixed order of sums costs nothing.

    Writes w_t (T,), the coefficients dLoss/dlogp_n (N,), and loss, clipped fraction, mean k3 (3,).
    """
    lane = tl.arange(0, BLOCK)

    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    poison = tl.zeros([BLOCK], tl.float32)  # NaN if any D_t is, else 0: min and max would drop it
    for first in range(0, T, BLOCK):
        t = first + lane
        low = tl.minimum(low, tl.load(divergence_ptr + t, t < T, other=float("inf")))
        high = tl.maximum(high, tl.load(divergence_ptr + t, t < T, other=float("-inf")))
        poison += 0 * tl.load(divergence_ptr + t, t < T, other=0.0)
    low = tl.min(low) + tl.sum(poison)
    slope = (alpha - 1) / (tl.max(high) - low + 1e-8)

    for first in range(0, T, BLOCK):
        t = first + lane
        w = tl.full([BLOCK], 1.0, tl.float32)
        if TOKEN_WEIGHTS:
            # w = 1 + (α-1) (D - min D) / (max D - min D + 1e-8)
            w += slope * (tl.load(divergence_ptr + t, t < T, other=0.0) - low)
        tl.store(token_weight_ptr + t, w, t < T)

    loss = tl.zeros([BLOCK], tl.float32)
    clipped = tl.zeros([BLOCK], tl.float32)
    kl = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        n = first + lane
        inside = n < N
        logp = tl.load(logp_ptr + n, inside, other=0.0)
        i = tl.load(completion_ptr + n, inside, other=0)
        advantage = tl.load(advantage_ptr + i).to(tl.float32)
        if TOKEN_WEIGHTS:
            t = tl.load(position_ptr + n, inside, other=0)
            share = (1 + slope * (tl.load(divergence_ptr + t) - low)) / N  # w_t / N
        else:
            share = 1.0 / (G * tl.load(length_ptr + i).to(tl.float32))  # 1 / (G len_i)
        # On-policy the old log-prob is the new one: rho is 1, and a NaN still shows.
        old = tl.load(old_ptr + n, inside, other=0.0).to(tl.float32) if HAS_OLD else logp
        rho = tl.exp(logp - old)
        bounded = tl.clamp(rho, 1 - eps_low, 1 + eps_high, propagate_nan=NAN_STAYS)
        # l = -min(ρ A, clip(ρ) A);  dl/dlogp = -ρ A, or 0 on the constant branch
        gain = tl.minimum(rho * advantage, bounded * advantage, propagate_nan=NAN_STAYS)
        low_side = (rho < 1 - eps_low) & (advantage < 0)
        is_clipped = low_side | ((rho > 1 + eps_high) & (advantage > 0))
        token_loss = -gain
        derivative = tl.where(is_clipped, 0.0, -rho * advantage)
        if HAS_REF:
            # l' = l + β (e^d - d - 1);  dl'/dlogp = dl/dlogp - β (e^d - 1), or 0 where d is clamped
            unclamped = tl.load(ref_ptr + n, inside, other=0.0).to(tl.float32) - logp
            d = clamp_log_ratio(unclamped)
            estimate = k3(d)
            token_loss += beta * estimate
            derivative -= tl.where(d == unclamped, beta * (estimate + d), 0.0)
            kl += tl.where(inside, estimate, 0.0)
        loss += tl.where(inside, share * token_loss, 0.0)
        clipped += tl.where(inside & is_clipped, 1.0, 0.0)
        tl.store(coefficient_ptr + n, share * derivative, inside)
    tl.store(summary_ptr, tl.sum(loss))
    tl.store(summary_ptr + 1, tl.sum(clipped) / N)
    tl.store(summary_ptr + 2, tl.sum(kl) / N)


def objective(
    logps_N, divergence_T, rows, lengths_G, advantages_G, old_logps_N, ref_logps_N,
    *, block, alpha, eps_low, eps_high, beta, loss_type,
):  # fmt: skip
    """(weights_T, coefficients_N, summary): what `objective_kernel` writes, all float32."""
    weights_T = torch.empty_like(divergence_T)
    coefficients_N = torch.empty_like(logps_N)
    summary = logps_N.new_empty(3)
    unused = logps_N  # a pointer the kernel never follows
    objective_kernel[(1,)](
        divergence_T, logps_N,
        unused if old_logps_N is None else old_logps_N.contiguous(),
        unused if ref_logps_N is None else ref_logps_N.contiguous(),
        rows.completion_N, rows.position_N, lengths_G, advantages_G.contiguous(),
        weights_T, coefficients_N, summary,
        len(logps_N), len(divergence_T), len(lengths_G),
        float(alpha), float(eps_low), float(eps_high), float(beta),
        TOKEN_WEIGHTS=loss_type == "tw_grpo", HAS_OLD=old_logps_N is not None,
        HAS_REF=ref_logps_N is not None,
        BLOCK=block, num_warps=8,
    )  # fmt: skip
    return weights_T, coefficients_N, summary
