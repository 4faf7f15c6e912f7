"""Packs a question and its G completions into one row [prompt | c_1 | c_2 | ... | c_G], with
attention to match, so that the prompt is scored once instead of G times.

A token of c_i attends to the prompt and its own earlier tokens, at the positions it would have
alone. Attention is called once for the prompt and once for its completions as a batch, without an
L x L mask. --attn_implementation says which attention that is; both give the same numbers:

    sdpa                torch's fused attention; works everywhere
    flash_attention_2   flash-attn 2.1 or later; CUDA only

Shape letters: B questions, G completions of each, T tokens of the longest completion, L tokens of
the longest row, N completion tokens of a question, M keys, H query heads, K key heads, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from data import Question


@dataclass
class Group:
    """One question and the G completions sampled for it."""

    question: Question
    # G vectors of int64 token ids, including the end token if there is one
    completions: list[Tensor] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)  # G; False: cut off at the length limit
    texts: list[str] = field(default_factory=list)  # G, decoded without special tokens
    sampled_logps_N: Tensor | None = None  # (N,) log-probs at the time of sampling
    features: Tensor | None = None  # (video tokens, D), kept if the vision tower is frozen
    rewards_GK: Tensor | None = None  # from K reward functions
    advantages_G: Tensor | None = None
    old_logps_N: Tensor | None = None  # under the sampling weights; None before the first update
    ref_logps_N: Tensor | None = None  # under the reference model; None without one
    seed: tuple[int, ...] = ()  # that it was sampled with

    @property
    def lengths_G(self) -> Tensor:
        return torch.tensor([len(c) for c in self.completions])

    @property
    def targets_N(self) -> Tensor:
        return torch.cat(self.completions)


def pack(groups: list[Group], pad_id: int) -> tuple[Tensor, Tensor, list[list[int]], list[Tensor]]:
    """Eq. 7: a row [prompt | c_1 | c_2 | ... | c_G] per question, right-padded to the longest.

    Returns ids_BL, positions_3BL and, per question, the lengths of the non-empty parts of its row
    and rows_N, the indices in its row whose hidden states predict its completion tokens. Every
    completion's positions continue from the prompt's end, as if it were alone. The last token of a
    completion predicts nothing and is left out; the first is predicted by the prompt's last hidden
    state, which all G completions share.
    """
    rows_ids, rows_positions, sizes, rows_N = [], [], [], []
    for group in groups:
        question, bodies = group.question, [c[:-1] for c in group.completions]
        P, lengths = len(question.ids_P), [len(body) for body in bodies]
        following = question.positions_3P.max() + 1
        positions = [(following + torch.arange(n)).expand(3, -1) for n in lengths]
        prompt, *own = torch.arange(P + sum(lengths)).split([P, *lengths])
        predictors = [x for part in own for x in (prompt[-1:], part)]
        rows_ids.append(torch.cat([question.ids_P, *bodies]))
        rows_positions.append(torch.cat([question.positions_3P, *positions], dim=1).T)
        sizes.append([P, *filter(None, lengths)])
        rows_N.append(torch.cat(predictors or [prompt[:0]]))
    ids_BL = pad_sequence(rows_ids, batch_first=True, padding_value=pad_id)
    return ids_BL, pad_sequence(rows_positions).permute(2, 1, 0), sizes, rows_N


def torch_attend(q_BHTd: Tensor, k_BKMd: Tensor, v_BKMd: Tensor, scale: float) -> Tensor:
    """Causal attention, the last query at the last key: (B, T, H, d)."""
    how = dict(attn_mask=causal_lower_right(q_BHTd.shape[2], k_BKMd.shape[2]), enable_gqa=True)
    out_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BKMd, v_BKMd, scale=scale, **how)
    return out_BHTd.transpose(1, 2)


def flash_attend(q_BHTd: Tensor, k_BKMd: Tensor, v_BKMd: Tensor, scale: float) -> Tensor:
    """Same as `torch_attend`: from version 2.1 on, flash-attn aligns the last query and key too."""
    from flash_attn import flash_attn_func

    qkv = (x.transpose(1, 2) for x in (q_BHTd, k_BKMd, v_BKMd))
    return flash_attn_func(*qkv, softmax_scale=scale, causal=True)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: list[list[int]] | None = None,
    attend: Callable[..., Tensor] = torch_attend,
    **_,
) -> tuple[Tensor, None]:
    """Attention over packed rows, as transformers calls it: query (B, H, L, d), key and value with
    fewer heads; returns (B, L, H, d). `packed` holds the sizes from `pack`; without it, as when
    prefilling prompts alone, this is transformers' own causal attention.

    The prompt attends to itself; then its completions, as a batch of G, attend to [prompt, own].
    They are right-padded, which causal attention never sees. The padding costs multiplications:
    each completion takes as many as the longest of its group.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # float32 under autocast
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    rows = []
    for sizes, *qkv in zip(packed, query, key, value, strict=True):
        split = [x_HLd[:, : sum(sizes)].split(sizes, dim=1) for x_HLd in qkv]
        (q, k, v), *own = zip(*split, strict=True)  # of the prompt, and of each completion
        row = [attend(q[None], k[None], v[None], scaling)[0]]
        if own:  # otherwise every completion has only one token, which predicts nothing
            G, T = len(own), max(sizes[1:])
            q, *kv_own = (
                torch.stack([F.pad(x_HLd, (0, 0, 0, T - x_HLd.shape[1])) for x_HLd in parts])
                for parts in zip(*own, strict=True)
            )
            k, v = (
                torch.cat([prompt.expand(G, -1, -1, -1), x_GKTd], dim=2)
                for prompt, x_GKTd in zip((k, v), kv_own, strict=True)
            )
            out = attend(q, k, v, scaling)
            row += [out_THd[:n] for out_THd, n in zip(out, sizes[1:], strict=True)]
        rows.append(torch.cat(row))
    return pad_sequence(rows, batch_first=True), None


ATTENTION = {"sdpa": torch_attend, "flash_attention_2": flash_attend}  # --attn_implementation
AttentionInterface.register("packed_rows", packed_attention)
