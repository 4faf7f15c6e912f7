"""Two equations on register tiles, called from inside the kernels: k3 and the group's spread.

Both are Triton functions without loads or stores, so each equation is written only once for the
chunked kernels (tiles rows x words) and the fused ones (words x rows x positions). Shape letters:
`kernels/reference.py`.
"""

import triton
import triton.language as tl

# Triton recompiles a kernel whenever an integer becomes 1 or a multiple of 16, or a pointer's
# alignment changes. Where that depends on a group's lengths, it would stall a step for seconds and
# gain nothing. Each kernel lists such integers; such pointers are listed here: rows of larger
# tensors and views from the caller.
VIEWS = ["target_ptr", "logp_ptr", "peak_ptr", "log_sum_ptr", "sum_ptr", "coefficient_ptr"]

LOG_RATIO_CLAMP = tl.constexpr(11.0)  # nats, as in reference.py


@triton.jit
def k3_series(d):
    """Eq. 22: exp(d) - d - 1 for abs(d) < 1/2; the truncation error is below 1e-6 of the result."""
    # e^d - d - 1 = d² (1/2! + d/3! + d²/4! + ...)
    series = 1 / 720 + d * (1 / 5040)
    series = 1 / 24 + d * (1 / 120 + d * series)
    return d * d * (1 / 2 + d * (1 / 6 + d * series))


@triton.jit
def k3(d):
    """exp(d) - d - 1 of the clamped d: the integrand of the group's divergence.

    For small d the three terms cancel completely, so the series is used instead.
    """
    # Triton's clamp drops NaNs by default; a loss must not hide one.
    d = tl.clamp(d, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(tl.abs(d) < 0.5, k3_series(d), tl.exp(d) - d - 1)


@triton.jit
def kl_integrand(p, q, d):
    """Eq. 23: p log(p/q) + q - p for d = log q - log p; the q - p terms cancel in the group mean.

    It equals p k3(d), is never negative, and stays precise where p and q are nearly equal.
    """
    return tl.where(tl.abs(d) < 0.5, p * k3_series(d), q - p - p * d)


@triton.jit
def group_spread(logp, alive, alive_count, ended, log_V, FORM: tl.constexpr, AXIS: tl.constexpr):
    """Eqs. 12 to 15 and 31, D_t at each word: the integrand of `reference.group_divergence`.

    logp         float32 tile of log-probs, the rows of a group along AXIS
    alive        mask of the rows that exist; the others are never read
    alive_count  number of alive rows, float32
    ended        number of uniform rows that replace ended completions, float32; 0: none
    Returns the tile with length 1 along AXIS.

    Ended rows are all equal, -log V at every word, so they are counted, not stored. Log-probs are
    taken relative to the group's largest at that word (`anchor`): identical rows then differ by
    exactly 0, and the textbook form cannot underflow.
    """
    if FORM == "entropy":  # of alive rows only
        ended = 0.0
    share = 1 / (alive_count + ended)
    anchor = tl.max(tl.where(alive, logp, float("-inf")), axis=AXIS, keep_dims=True)
    anchor = tl.where(ended > 0, tl.maximum(anchor, -log_V), anchor)
    row = tl.where(alive, logp - anchor, 0.0)
    uniform = -log_V - anchor
    if FORM == "entropy":
        terms = tl.where(alive, -tl.exp(logp) * logp, 0.0)  # -p_i log p_i
        spread = tl.sum(terms, axis=AXIS, keep_dims=True)
    elif FORM == "textbook":
        p = tl.where(alive, tl.exp(row), 0.0)
        p_uniform = tl.where(ended > 0, tl.exp(uniform), 0.0)
        total = tl.sum(p, axis=AXIS, keep_dims=True) + ended * p_uniform
        q = total * share  # q = mean_i p_i
        terms = kl_integrand(p, q, tl.log(q) - row)  # p_i log p_i / q + q - p_i
        spread = tl.sum(tl.where(alive, terms, 0.0), axis=AXIS, keep_dims=True)
        spread += ended * kl_integrand(p_uniform, q, tl.log(q) - uniform)
        spread *= tl.exp(anchor)
    else:
        total = tl.sum(row, axis=AXIS, keep_dims=True) + ended * uniform
        mean = total * share  # m = mean_i l_i
        terms = tl.where(alive, k3(mean - row), 0.0)  # e^d_i - d_i - 1
        spread = tl.sum(terms, axis=AXIS, keep_dims=True)
        spread += ended * k3(mean - uniform)
    return spread * share
