"""Packs a question and its G completions into one row [prompt | c_1 | c_2 | ... | c_G], with
attention to match, so that the prompt is scored once instead of G times.

A token of c_i attends to the prompt and its own earlier tokens, at the positions it would have
alone. Two implementations give the same numbers, neither with an L x L mask:

    sdpa                torch's fused attention, once for the prompt and once for its completions
                        as a batch; works everywhere
    flash_attention_2   flash-attn's variable-length call: the prompt is one sequence and each
                        completion another, over [prompt, own]; no padding; CUDA and flash-attn only

Shape letters: B questions, G completions of each, T tokens of the longest completion, L tokens of
the longest row, N completion tokens of a question, H query heads, d head size.
"""

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
        question = group.question
        P, following = len(question.ids_P), question.positions_3P.max() + 1
        ids, positions, predictors = [question.ids_P], [question.positions_3P], []
        start = P
        for completion in group.completions:
            body = completion[:-1]
            ids.append(body)
            positions.append((following + torch.arange(len(body))).expand(3, -1))
            predictors += [P - 1, *range(start, start + len(body))]
            start += len(body)
        rows_ids.append(torch.cat(ids))
        rows_positions.append(torch.cat(positions, dim=1).T)
        sizes.append([len(part) for part in ids if len(part)])
        rows_N.append(torch.tensor(predictors, dtype=torch.long))
    ids_BL = pad_sequence(rows_ids, batch_first=True, padding_value=pad_id)
    return ids_BL, pad_sequence(rows_positions).permute(2, 1, 0), sizes, rows_N


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: list[list[int]] | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Attention over packed rows, as transformers calls it: query (B, H, L, d), key and value with
    fewer heads; returns (B, L, H, d). `packed` holds the sizes from `pack`; without it, as when
    prefilling prompts alone, this is transformers' own causal attention.

    The prompt attends to itself; then its completions, as a batch of G, attend to [prompt, own].
    They are right-padded, which causal attention never sees.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # float32 under autocast
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    how = dict(scale=scaling, enable_gqa=True)
    rows = []
    for (P, *own), *qkv in zip(packed, query, key, value, strict=True):
        parts = [x_HLd[:, : P + sum(own)].split([P, *own], dim=1) for x_HLd in qkv]
        q, k, v = prompt = [x[0][None] for x in parts]
        row = [F.scaled_dot_product_attention(q, k, v, is_causal=True, **how)[0]]
        if own:  # otherwise every completion has only one token, which predicts nothing
            G, T = len(own), max(own)
            q, k, v = (
                torch.stack([F.pad(x, (0, 0, 0, T - x.shape[1])) for x in completions])
                for _, *completions in parts
            )
            k, v = (
                torch.cat([shared.expand(G, -1, -1, -1), x], dim=2)
                for shared, x in zip(prompt[1:], (k, v), strict=True)
            )
            sees = causal_lower_right(T, P + T)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, **how)
            row += [out_HTd[:, :n] for out_HTd, n in zip(out, own, strict=True)]
        rows.append(F.pad(torch.cat(row, dim=1), (0, 0, 0, query.shape[2] - P - sum(own))))
    return torch.stack(rows).transpose(1, 2), None


def flash_attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: list[list[int]] | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Same as `packed_attention`, with each part of a row as a sequence whose last query aligns
    with its last key. The output for padding is 0."""
    from flash_attn import flash_attn_varlen_func

    if packed is None:
        return packed_attention(module, query, key, value, attention_mask, scaling=scaling)
    queries, seen = [], ([], [])  # seen: keys, values
    lengths = [[P, *(P + n for n in own)] for P, *own in packed]  # keys each sequence attends to
    for sizes, *qkv in zip(packed, query, key, value, strict=True):
        q_NHd, *kv = (x.transpose(0, 1)[: sum(sizes)].to(value.dtype) for x in qkv)
        queries.append(q_NHd)
        for parts, x_NKd in zip(seen, kv, strict=True):
            prompt, *own = x_NKd.split(sizes)
            parts += [prompt, *(x for part in own for x in (prompt, part))]

    def starts(parts: list[list[int]]) -> Tensor:
        ends = torch.tensor(sum(parts, [])).cumsum(0)
        return F.pad(ends, (1, 0)).to(query.device, torch.int32, non_blocking=True)

    out = flash_attn_varlen_func(
        torch.cat(queries),
        torch.cat(seen[0]),
        torch.cat(seen[1]),
        starts(packed),
        starts(lengths),
        max(map(max, packed)),
        max(map(max, lengths)),
        softmax_scale=scaling,
        causal=True,
    )
    return pad_sequence(out.split([sum(sizes) for sizes in packed]), batch_first=True), None


# --attn_implementation: the attention of the language model. (Given a name with "flash" in it,
# transformers would look for a library of that name.)
ATTENTION = {"sdpa": "packed_sdpa", "flash_attention_2": "packed_varlen"}
AttentionInterface.register("packed_sdpa", packed_attention)
AttentionInterface.register("packed_varlen", flash_attend)
