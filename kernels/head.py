"""The entry to the kernels: hidden states of one question's completions to the TW-GRPO loss.

Letters as in `kernels/reference.py`: G completions of one question, N their tokens, T the longest, V words, D hidden.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.reference import HeadOutput

IMPLS = ("auto", "reference")


def tw_grpo_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    lengths_G: Tensor,
    advantages_G: Tensor,
    *,
    old_logps_N: Tensor | None = None,
    ref_logps_N: Tensor | None = None,
    alpha: float = 1.7,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    beta: float = 0.0,
    temperature: float = 1.0,
    loss_type: str = "tw_grpo",
    divergence: str = "official",
    ended_rows: str = "uniform",
    detach_weights: bool = True,
    impl: str = "auto",
) -> HeadOutput:
    """The clipped, token-weighted loss of one question and everything measured on the way.

    hidden_ND     (N, D) float: the rows that *predict* the completion tokens, all of c_1, then c_2, ...
    weight_VD     (V, D) same dtype: the lm_head. If it does not require grad, its gradient is never formed.
    targets_N     (N,) int64: the completion tokens themselves, in [0, V)
    lengths_G     (G,) int64: tokens of each completion, EOS included; at least 1 each, summing to N
    advantages_G  (G,) float
    old_logps_N   (N,) float: log-probs before the first update on these completions; None: on-policy, ratio 1
    ref_logps_N   (N,) float: log-probs of the reference model, required when beta > 0
    alpha         upper bound of the token weights, >= 1 (the code's alpha; tables that say "alpha = 0" mean w = 1)
    loss_type     "tw_grpo" | "grpo";  divergence  "official" | "textbook";  ended_rows  "uniform" | "exclude"
    detach_weights  False (reference only): the gradient flows through w_t too, as in the official code
    impl          "auto" | "reference"

    A NaN in `hidden_ND` gives a NaN loss. Raises ValueError or TypeError naming the argument that is wrong.
    """
    check_inputs(hidden_ND, weight_VD, targets_N, temperature)
    check_group(hidden_ND, targets_N, lengths_G, advantages_G, old_logps_N, ref_logps_N, alpha, beta)
    for name, value, allowed in (
        ("loss_type", loss_type, ("tw_grpo", "grpo")),
        ("divergence", divergence, ("official", "textbook")),
        ("ended_rows", ended_rows, ("uniform", "exclude")),
        ("impl", impl, IMPLS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    return reference.tw_grpo(
        hidden_ND, weight_VD, targets_N, lengths_G, advantages_G, old_logps_N=old_logps_N, ref_logps_N=ref_logps_N,
        alpha=alpha, eps_low=eps_low, eps_high=eps_high, beta=beta, temperature=temperature, loss_type=loss_type,
        divergence=divergence, ended_rows=ended_rows, detach_weights=detach_weights,
    )  # fmt: skip


@torch.no_grad()
def token_logps(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0, impl: str = "auto"
) -> Tensor:
    """Log-probability of each target, nats: (N,) float32 or wider, without gradient.

    For the old and the reference log-probs; arguments as in `tw_grpo_head`.
    """
    check_inputs(hidden_ND, weight_VD, targets_N, temperature)
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, not {impl!r}")
    return reference.token_logps(hidden_ND, weight_VD, targets_N, temperature)


def check_inputs(hidden_ND, weight_VD, targets_N, temperature) -> None:
    """Shapes, dtypes and ranges of what a head reads; raises ValueError or TypeError naming the argument."""
    if hidden_ND.ndim != 2 or not hidden_ND.is_floating_point():
        raise ValueError(f"hidden_ND must be a float (N, D) matrix, not {hidden_ND.dtype} {tuple(hidden_ND.shape)}")
    N, D = hidden_ND.shape
    if weight_VD.ndim != 2 or weight_VD.shape[1] != D:
        raise ValueError(f"weight_VD must be (V, D) with D = {D} as in hidden_ND, not {tuple(weight_VD.shape)}")
    if weight_VD.dtype != hidden_ND.dtype:
        raise TypeError(f"weight_VD is {weight_VD.dtype} and hidden_ND {hidden_ND.dtype}: cast one to the other")
    if targets_N.shape != (N,) or targets_N.dtype != torch.int64:
        raise ValueError(f"targets_N must be ({N},) int64, not {tuple(targets_N.shape)} {targets_N.dtype}")
    if N == 0:
        raise ValueError("hidden_ND has no rows: a group needs at least one completion token")
    low, high = targets_N.aminmax()
    if low < 0 or high >= weight_VD.shape[0]:
        raise ValueError(f"targets_N holds {int(low)}..{int(high)}, outside the vocabulary of {weight_VD.shape[0]} words")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")


def check_group(hidden_ND, targets_N, lengths_G, advantages_G, old_logps_N, ref_logps_N, alpha, beta) -> None:
    """What ties the N rows to the G completions; raises ValueError or TypeError naming the argument."""
    N = len(targets_N)
    if lengths_G.ndim != 1 or lengths_G.dtype != torch.int64:
        raise ValueError(f"lengths_G must be (G,) int64, not {tuple(lengths_G.shape)} {lengths_G.dtype}")
    if (lengths_G < 1).any():
        raise ValueError(f"lengths_G must be at least 1 each (an empty completion has no token), not {lengths_G.tolist()}")
    if int(lengths_G.sum()) != N:
        raise ValueError(f"lengths_G sums to {int(lengths_G.sum())}, but hidden_ND and targets_N have {N} rows")
    if advantages_G.shape != lengths_G.shape or not advantages_G.is_floating_point():
        raise ValueError(f"advantages_G must be a float vector like lengths_G {tuple(lengths_G.shape)}, "
                         f"not {advantages_G.dtype} {tuple(advantages_G.shape)}")  # fmt: skip
    for name, logps in (("old_logps_N", old_logps_N), ("ref_logps_N", ref_logps_N)):
        if logps is not None and (logps.shape != (N,) or not logps.is_floating_point()):
            raise ValueError(f"{name} must be a float ({N},) vector, not {logps.dtype} {tuple(logps.shape)}")
    if not alpha >= 1:
        raise ValueError(f"alpha is the upper bound of the token weights and must be at least 1, not {alpha}")
    if beta > 0 and ref_logps_N is None:
        raise ValueError("beta > 0 needs ref_logps_N, the log-probs of the reference model")
    if not beta >= 0:
        raise ValueError(f"beta must be 0 or more, not {beta}")
