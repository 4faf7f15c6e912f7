"""The equations of TW-GRPO in plain PyTorch: the specification every kernel is tested against.

One function per equation, in the paper's order. Everything is differentiable and runs in any
float dtype, including float64. The functions up to D_t (eqs. 8 to 15) are slow and materialise the
full vocabulary for every token, so the kernels replace them; `weighted_loss` is shared by both.

Shape letters, for every file in kernels/ and its tests:
    G  completions of one question (a group)           V  vocabulary
    T  positions: length of the longest completion     D  hidden size
    N  completion tokens of the group, sum(lengths)    n, t, i, v  token, position, completion, word
    S  vocabulary slices, or words in one              R  rows (tokens) in one chunk
Tokens are stored completion by completion: all of c_1, then all of c_2, and so on.

Source of the formulas: the official code at aa529ff, src/open_r1/trainer/grpo_trainer.py
(`compute_loss` and `compute_token_importance_kl_logs_uniform`), and the paper, arXiv 2505.24718.
"Eq. 14" means number 14 in docs/equations.md, which has implementation notes on every equation.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

LOG_RATIO_CLAMP = 11.0  # nats; the official clamp on every log-ratio before exp


@dataclass(frozen=True)
class LossOptions:
    """The options of `kernels.tw_grpo_head`, with the same names and values as the training flags.

    Raises ValueError for a value out of range.
    """

    alpha: float = 1.7  # upper bound of the token weights (published tables write w = 1 as alpha=0)
    epsilon: float = 0.2  # ratios are clipped to [1 - epsilon, 1 + epsilon_high]
    epsilon_high: float = 0.28
    beta: float = 0.0  # coefficient of the KL term
    temperature: float = 1.0  # divides the logits
    loss_type: Literal["tw_grpo", "grpo"] = "tw_grpo"
    divergence: Literal["official", "textbook"] = "official"
    ended_rows: Literal["uniform", "exclude"] = "uniform"  # how ended completions count in D_t
    token_weights: Literal["divergence", "entropy", "position", "shuffled", "none"] = "divergence"
    normalize_token_weights: bool = False  # True: rescale to mean weight 1 over the tokens
    shuffle_seed: tuple[int, ...] = ()  # seeds the permutation for "shuffled"

    def __post_init__(self):
        least = dict(alpha=1, beta=0, temperature=1e-3)
        for name, kind in ((field.name, field.type) for field in fields(self)):
            value = getattr(self, name)
            if name in least and not value >= least[name]:
                raise ValueError(f"{name} must be at least {least[name]}, not {value}")
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(kind))}, not {value!r}"
                )

    @property
    def form(self) -> str:
        """How D_t is computed: the form of the divergence, or the entropy in its place."""
        return "entropy" if self.token_weights == "entropy" else self.divergence


@dataclass
class HeadOutput:
    """What `kernels.tw_grpo_head` returns. Only `loss` carries a gradient."""

    loss: Tensor  # ()   differentiable in hidden and weight
    logps_N: Tensor  # (N,) log-probability of each completion token, nats
    divergence_T: Tensor  # (T,) D_t, the spread of the group's next-token distributions, nats
    weights_T: Tensor  # (T,) w_t, in [1, alpha] unless normalised; ones for loss_type "grpo"
    clip_ratio: Tensor  # ()   fraction of the N tokens whose ratio was clipped
    kl: Tensor  # ()   mean k3 estimate of KL(policy || reference model), nats; else 0


def vocab_logps(hidden_ND: Tensor, weight_VD: Tensor, temperature: float = 1.0) -> Tensor:
    """Eq. 8: log softmax(h W^T / temperature), nats: (N, V), in float32 or wider.

    bf16 inputs are upcast first: rounding the logits to bf16 changes D_t by a relative 3.5e-3
    (measured at V = 152064).
    """
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    logits_NV = hidden_ND.to(wide) @ weight_VD.to(wide).T
    # OFFICIAL: the loss uses the raw logits, whatever the sampling temperature.
    # OURS: the same temperature in both, so that the gradient is that of the distribution we
    # sampled from.
    return F.log_softmax(logits_NV / temperature, dim=-1)


def positions_of_tokens(lengths_G: Tensor, N: int | None = None) -> tuple[Tensor, Tensor]:
    """Eq. 6: (completion_N, position_N), each token's completion and its position t.

    Passing N, the sum of the lengths, avoids a GPU synchronisation to compute it.
    """
    device = lengths_G.device
    completions = torch.arange(len(lengths_G), device=device)
    completion_N = torch.repeat_interleave(completions, lengths_G, output_size=N)
    starts_G = lengths_G.cumsum(0) - lengths_G
    position_N = torch.arange(len(completion_N), device=device) - starts_G[completion_N]
    return completion_N, position_N


def group_divergence(
    logps_GTV: Tensor, lengths_G: Tensor, form: str = "official", ended_rows: str = "uniform"
) -> Tensor:
    """Eqs. 12 to 15. D_t: how much the G next-token distributions at t disagree, in nats: (T,).

    With l_i = logps_GTV[i, t], a distribution over V words, and all means over the group:

    - form="official":  m = mean_i l_i,  d_i = clamp(m - l_i, -11, 11),
      D_t = mean_i sum_v (exp d_i - d_i - 1).
      m is a mean of logs (a geometric mean, not renormalised), and the sum runs over the whole
      vocabulary without the weight p_i(v) that would make it an expectation. This is the integrand
      of the k3 estimator, not a KL divergence.
    - form="textbook":  q = mean_i p_i,  D_t = mean_i KL(p_i || q), the Jensen-Shannon divergence,
      at most ln G.
    - form="entropy" (eq. 31):  mean_i -sum_v p_i log p_i, at most ln V. Not a disagreement: it
      measures how uncertain each completion is on its own.

    A completion that has ended by t (t >= lengths_G[i]) is replaced by the uniform distribution
    for ended_rows="uniform" (official) and excluded from every mean for ended_rows="exclude";
    entropies always exclude it. logps_GTV is never read there.
    """
    G, T, V = logps_GTV.shape
    alive_GT1 = (torch.arange(T, device=logps_GTV.device) < lengths_G[:, None])[..., None]
    if ended_rows == "uniform" and form != "entropy":
        rows = torch.where(alive_GT1, logps_GTV, -math.log(V))
        share_GT1 = torch.full_like(rows[..., :1], 1 / G)
    else:
        rows = torch.where(alive_GT1, logps_GTV, 0.0)  # any finite value: its share is 0
        share_GT1 = alive_GT1.to(rows.dtype) / alive_GT1.sum(0, keepdim=True)

    if form == "official":
        mean_TV = (share_GT1 * rows).sum(0)
        d = (mean_TV - rows).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        spread_GT = (torch.expm1(d) - d).sum(-1)  # expm1: exp(d) - 1 cancels for small d
    elif form == "textbook":
        log_mean_TV = torch.logsumexp(rows + share_GT1.log(), dim=0)
        # p log p -> 0 as p -> 0, even where a logit of -inf makes log p infinite
        log_ratio = torch.where(rows > -math.inf, rows - log_mean_TV, 0.0)
        spread_GT = (rows.exp() * log_ratio).sum(-1)
    elif form == "entropy":
        spread_GT = torch.special.entr(rows.exp()).sum(-1)
    else:
        raise ValueError(f"divergence must be official, textbook or entropy, not {form!r}")
    return (share_GT1[..., 0] * spread_GT).sum(0)


def token_weights(divergence_T: Tensor, alpha: float) -> Tensor:
    """Eqs. 16, 17. w_t = 1 + (alpha-1) (D_t - min D) / (max D - min D + 1e-8), in [1, alpha]: (T,).

    Minimum and maximum are over all T positions of the group; all completions share the weight of
    a position.
    """
    low, high = divergence_T.min(), divergence_T.max()
    return 1 + (alpha - 1) * (divergence_T - low) / (high - low + 1e-8)


def position_weights(divergence_T: Tensor, alpha: float) -> Tensor:
    """Eq. 32. w_t = 1 + (alpha-1) t / max(T-1, 1): from 1 to alpha, whatever the tokens are: (T,).

    A control: are weights useful just because they are larger at late positions?
    """
    T = len(divergence_T)
    t = torch.arange(T, dtype=divergence_T.dtype, device=divergence_T.device)
    return 1 + (alpha - 1) * t / max(T - 1, 1)


def shuffled_weights(weights_T: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Eq. 33. The same weights, randomly permuted over positions with the given seed: (T,)."""
    order = np.random.default_rng(seed).permutation(len(weights_T))
    return weights_T[torch.from_numpy(order).to(weights_T.device)]


def normalized_weights(weights_T: Tensor, position_N: Tensor) -> Tensor:
    """Eq. 34. w_t divided by its mean over the N tokens, so that (1/N) sum_n w = 1: (T,).

    Different forms then differ only in where they put weight, not in its total.
    """
    return weights_T / weights_T[position_N].mean()


def weights_of(divergence_T: Tensor, position_N: Tensor, options: LossOptions) -> Tensor:
    """The weights selected by the options, from D_t or one of the controls: (T,)."""
    if options.loss_type == "grpo" or options.token_weights == "none":
        weights_T = torch.ones_like(divergence_T)
    elif options.token_weights == "position":
        weights_T = position_weights(divergence_T, options.alpha)
    else:
        weights_T = token_weights(divergence_T, options.alpha)
    if options.token_weights == "shuffled":
        weights_T = shuffled_weights(weights_T, options.shuffle_seed)
    if options.normalize_token_weights:
        weights_T = normalized_weights(weights_T, position_N)
    return weights_T


def clipped_objective(
    logps_N: Tensor, old_logps_N: Tensor, advantages_N: Tensor, epsilon: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """Eqs. 9, 10: min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) with
    rho = exp(logp - old_logp): (N,), and where it clipped.

    A token counts as clipped if the constant branch is the smaller one, that is, if its gradient
    is zero.
    """
    rho = torch.exp(logps_N - old_logps_N)
    clipped = rho.clamp(1 - epsilon, 1 + epsilon_high)
    too_low, too_high = rho < 1 - epsilon, rho > 1 + epsilon_high
    is_clipped = (too_low & (advantages_N < 0)) | (too_high & (advantages_N > 0))
    return torch.minimum(rho * advantages_N, clipped * advantages_N), is_clipped


def k3_kl(logps_N: Tensor, ref_logps_N: Tensor) -> Tensor:
    """Eq. 11: k3 = exp(d) - d - 1 with d = clamp(ref_logp - logp, -11, 11): (N,).

    An estimate of KL(policy || reference), nats.
    """
    d = (ref_logps_N - logps_N).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return torch.expm1(d) - d


def token_coefficients(
    completion_N: Tensor, position_N: Tensor, lengths_G: Tensor, weights_T: Tensor, loss_type: str
) -> Tensor:
    """Eqs. 18, 19: the coefficient of each token's loss in the total: (N,).

    - "tw_grpo":  w_t / N, one weighted mean over all tokens of the group. With alpha = 1 this is
      token-normalised GRPO.
    - "grpo":     1 / (G len_i), the mean over each completion, then over completions.
    """
    if loss_type == "grpo":
        return 1.0 / (len(lengths_G) * lengths_G[completion_N].to(weights_T.dtype))
    return weights_T[position_N] / len(position_N)


def weighted_loss(
    logps_N: Tensor,
    divergence_T: Tensor,
    lengths_G: Tensor,
    advantages_G: Tensor,
    old_logps_N: Tensor | None,
    ref_logps_N: Tensor | None,
    options: LossOptions,
) -> HeadOutput:
    """Eqs. 9 to 11, 16 to 19 and 32 to 34: from log-probs and D_t to the loss of one question.

    Autograd gives its derivative with respect to logps_N, eq. 24. Never synchronises with the GPU.
    """
    completion_N, position_N = positions_of_tokens(lengths_G, len(logps_N))
    weights_T = weights_of(divergence_T, position_N, options)
    # On policy the old log-probs are the new ones: rho = 1, and the clip never acts.
    old_N = logps_N.detach() if old_logps_N is None else old_logps_N
    objective_N, is_clipped_N = clipped_objective(
        logps_N, old_N, advantages_G[completion_N], options.epsilon, options.epsilon_high
    )
    kl_N = torch.zeros_like(logps_N) if ref_logps_N is None else k3_kl(logps_N, ref_logps_N)
    loss_N = -(objective_N - options.beta * kl_N) if options.beta > 0 else -objective_N
    share_N = token_coefficients(completion_N, position_N, lengths_G, weights_T, options.loss_type)
    return HeadOutput(
        loss=(share_N * loss_N).sum(),
        logps_N=logps_N.detach(),
        divergence_T=divergence_T.detach(),
        weights_T=weights_T.detach(),
        clip_ratio=is_clipped_N.float().mean(),
        kl=kl_N.detach().mean(),
    )


def tw_grpo(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    lengths_G: Tensor,
    advantages_G: Tensor,
    old_logps_N: Tensor | None,
    ref_logps_N: Tensor | None,
    options: LossOptions,
) -> HeadOutput:
    """The whole loss of one question, eqs. 8 to 19 in order. Arguments: `kernels.tw_grpo_head`."""
    logps_NV = vocab_logps(hidden_ND, weight_VD, options.temperature)
    logps_N = logps_NV.gather(1, targets_N[:, None])[:, 0]
    # OFFICIAL: the gradient also flows through w_t.  OURS: w_t is detached; it says how important a
    # token is and is not something to optimise. (The two agree on policy without KL if all
    # completions have the same length.)
    logps_GTV = pad_sequence(logps_NV.detach().split(lengths_G.tolist()), batch_first=True)
    divergence_T = group_divergence(logps_GTV, lengths_G, options.form, options.ended_rows)
    return weighted_loss(
        logps_N, divergence_T, lengths_G, advantages_G, old_logps_N, ref_logps_N, options
    )


def token_logps(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probability of each target, nats: (N,)."""
    return vocab_logps(hidden_ND, weight_VD, temperature).gather(1, targets_N[:, None])[:, 0]
