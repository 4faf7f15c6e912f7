"""One question with its G completions as one row [prompt | c_1 | c_2 | ... | c_G], and attention
over it, so that the prompt is scored once instead of G times.

A token of c_i sees the prompt and its own earlier tokens, at the positions it would have alone.
There are two ways to compute that, which give the same numbers; neither makes a mask:

    sdpa                torch's fused attention, for the prompt and for its completions: everywhere
    flash_attention_2   flash-attn's variable-length call: the prompt is one sequence, each
                        completion another, over [prompt, own]; no padding; CUDA, its own package

Letters in shapes: B questions, G completions of each, T tokens of the longest, L tokens of the
longest row, N completion tokens of a question, H query heads, d their size, S sequences in a
variable-length call, Q tokens that ask in it, K tokens they may see.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from data import Question


@dataclass
class Group:
    """One question and the G completions sampled for it."""

    question: Question
    # G vectors of int64 token ids, the end token included where one came
    completions: list[Tensor] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)  # G; False: cut off at the length limit
    texts: list[str] = field(default_factory=list)  # G, decoded without special tokens
    sampled_logps_N: Tensor | None = None  # (N,) log-probs at the time of sampling
    features: Tensor | None = None  # (video tokens, D), kept where the vision tower is frozen
    rewards_GK: Tensor | None = None  # of K reward functions
    advantages_G: Tensor | None = None
    old_logps_N: Tensor | None = None  # of the weights that sampled; None before the first update
    ref_logps_N: Tensor | None = None  # of the reference model; None without one
    seed: tuple[int, ...] = ()  # of its sampling

    @property
    def lengths_G(self) -> Tensor:
        return torch.tensor([len(c) for c in self.completions])

    @property
    def targets_N(self) -> Tensor:
        return torch.cat(self.completions)


def pack(groups: list[Group], pad_id: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Eq. 7: a row [prompt | c_1 | c_2 | ... | c_G] per question, right-padded to the longest.

    Returns ids_BL, positions_3BL, segments_BL and, for each question, rows_N: the places in its row
    whose hidden states predict its completion tokens. Every completion's positions go on from the
    prompt's end, as if it stood there alone. Segments are 0 for the prompt, i for c_i, -1 for
    padding. The last token of a completion predicts nothing and is left out; the first is predicted
    by the prompt's last row, which all G completions share.
    """
    rows_ids, rows_positions, rows_segments, rows_N = [], [], [], []
    for group in groups:
        question = group.question
        ids, positions = [question.ids_P], [question.positions_3P]
        segments, predictors = [torch.zeros_like(question.ids_P)], []
        start, following = len(question.ids_P), question.positions_3P.max() + 1
        for i, completion in enumerate(group.completions, 1):
            body = completion[:-1]
            ids.append(body)
            positions.append((following + torch.arange(len(body))).expand(3, -1))
            segments.append(torch.full_like(body, i))
            predictors.append(torch.tensor([len(question.ids_P) - 1]))
            predictors.append(torch.arange(start, start + len(body)))
            start += len(body)
        rows_ids.append(torch.cat(ids))
        rows_positions.append(torch.cat(positions, dim=1))
        rows_segments.append(torch.cat(segments))
        rows_N.append(torch.cat(predictors) if predictors else torch.zeros(0, dtype=torch.long))
    L = max(len(ids) for ids in rows_ids)
    return (
        torch.stack([F.pad(x, (0, L - len(x)), value=pad_id) for x in rows_ids]),
        torch.stack([F.pad(x, (0, L - x.shape[1])) for x in rows_positions], dim=1),
        torch.stack([F.pad(x, (0, L - len(x)), value=-1) for x in rows_segments]),
        rows_N,
    )


# ------------------------------------------- sdpa: the prompt once, then the completions beside it


@dataclass
class Row:
    """Where the prompt and the completions of one question stand in its packed row."""

    prompt: slice
    own: slice  # the completions, N tokens in all
    grid: tuple[int, int]  # (G, T), of the completions that have tokens here
    slots_N: Tensor  # the place of each of these tokens in a flattened (G, T) grid

    def to_grid(self, x: Tensor) -> Tensor:
        """(1, H, N, ...) -> (G, H, T, ...): one completion a row, right-padded with zeros."""
        grid = x.new_zeros(x.shape[1], self.grid[0] * self.grid[1], *x.shape[3:])
        grid[:, self.slots_N] = x[0]
        return grid.unflatten(1, self.grid).transpose(0, 1)

    def from_grid(self, x: Tensor) -> Tensor:
        """The inverse of `to_grid`."""
        return x.transpose(0, 1).flatten(1, 2)[None, :, self.slots_N]


def packed_layout(segments_BL: Tensor, device: torch.device | str = "cpu") -> list[Row]:
    """Eq. 7 as `packed_attention` takes it: no mask, because padding comes last in each sequence,
    where causal attention never looks."""
    rows = []
    for segments_L in segments_BL:
        P, own_N = int((segments_L == 0).sum()), segments_L[segments_L > 0]
        lengths_G = own_N.unique_consecutive(return_counts=True)[1]
        T = max(lengths_G.tolist(), default=0)
        slots_N = (torch.arange(T) < lengths_G[:, None]).flatten().nonzero()[:, 0]
        own = slice(P, P + len(own_N))
        rows.append(Row(slice(P), own, (len(lengths_G), T), slots_N.to(device)))
    return rows


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: list[Row] | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Attention over packed rows, as transformers calls it: query (B, H, L, d), key and value with
    fewer heads; returns (B, L, H, d). `packed` is the layout; without one, as in a prefill of
    prompts alone, this is transformers' own causal attention."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast they are float32
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    return Joined.apply(query, key, value, packed, scaling).transpose(1, 2), None


class Joined(torch.autograd.Function):
    """The prompt attends to itself once. The completions of a question attend to the prompt, whose
    keys they share, and each to itself; the two parts have one softmax. Time and memory grow with
    the number of completions, not with its square.

    With o_1, o_2 the parts' outputs and L_1, L_2 their log-sum-exps, L = log(e^L_1 + e^L_2) and
    o = e^(L_1 - L) o_1 + e^(L_2 - L) o_2. The probabilities of each part are e^(score - L), so its
    fused backward pass, given o and L in place of its own, returns the exact gradients.
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, rows: list[Row], scale: float
    ) -> Tensor:
        """query (B, H, L, d), key and value with fewer heads; returns (B, H, L, d)."""
        out = torch.zeros_like(query)
        accurate = torch.promote_types(query.dtype, torch.float32)
        lse = torch.zeros(query.shape[:3], dtype=accurate, device=query.device)
        for b, row in enumerate(rows):
            q, k, v = (x[b : b + 1, :, row.prompt] for x in (query, key, value))
            out_0, lse_0, state = flash(q, k, v, True, scale)
            out[b, :, row.prompt], lse[b, :, row.prompt] = out_0[0], lse_0[0]
            if not len(row.slots_N):  # every completion has one token, which predicts nothing
                continue
            own = [x[b : b + 1, :, row.own] for x in (query, key, value)]
            out_1, lse_1, _ = flash(own[0], k, v, False, scale)
            out_2, lse_2, _ = flash(*map(row.to_grid, own), True, scale)
            out_2, lse_2 = row.from_grid(out_2), row.from_grid(lse_2)
            joined = torch.logaddexp(lse_1, lse_2)
            share_1, share_2 = ((x - joined).exp()[..., None] for x in (lse_1, lse_2))
            out[b, :, row.own] = (share_1 * out_1 + share_2 * out_2)[0]
            lse[b, :, row.own] = joined[0]
        ctx.save_for_backward(query, key, value, out, lse, *state)
        ctx.rows, ctx.scale = rows, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *state = ctx.saved_tensors
        totals = [torch.zeros_like(x) for x in (query, key, value)]
        for b, row in enumerate(ctx.rows):
            prompt, own = (
                [x[b : b + 1, :, part] for x in (grad, query, key, value, out, lse)]
                for part in (row.prompt, row.own)
            )
            parts = flash_backward(*prompt, True, ctx.scale, state)
            for total, part in zip(totals, parts, strict=True):
                total[b, :, row.prompt] = part[0]
            if not len(row.slots_N):
                continue
            parts = flash_backward(*map(row.to_grid, own), True, ctx.scale, state)
            for total, part in zip(totals, parts, strict=True):
                total[b, :, row.own] = row.from_grid(part)[0]
            own[2:4] = prompt[2:4]  # the completions over the prompt
            parts = flash_backward(*own, False, ctx.scale, state)
            for total, part, place in zip(
                totals, parts, (row.own, row.prompt, row.prompt), strict=True
            ):
                total[b, :, place] += part[0]
        return *totals, None, None


def flash(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple]:
    """Torch's fused attention: output (b, H, n, d), log-sum-exp (b, H, n) in float32, and the state
    of the random numbers (of a dropout that is 0) which its backward pass on CUDA asks for. k and v
    may have fewer heads. On CUDA for bf16 and float16 only."""
    if q.is_cuda:
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *rest = attend(q, k, v, 0.0, is_causal, scale=scale)
        return out, lse, tuple(rest[4:6])
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return *attend(q, k, v, 0.0, is_causal, scale=scale), ()


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    state: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, for an output and log-sum-exp that may be of more keys."""
    # CUDA reads the log-sum-exp without looking at its strides.
    tensors, lse = (grad, q, k, v, out), lse.contiguous()
    if q.is_cuda:
        lengths = None, None, q.shape[2], k.shape[2]  # None: not a variable-length call
        differentiate = torch.ops.aten._scaled_dot_product_flash_attention_backward
        return differentiate(*tensors, lse, *lengths, 0.0, is_causal, *state, scale=scale)
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return differentiate(*tensors, lse, 0.0, is_causal, scale=scale)


# ----------------------------------------------------- flash_attention_2: one variable-length call


@dataclass
class Sequences:
    """Packed rows as a variable-length call takes them: for each sequence the tokens that ask, and
    the tokens they may see, both as places in the B L tokens of the flattened rows."""

    query_Q: Tensor
    key_K: Tensor  # each prompt occurs here G + 1 times, once for each sequence that sees it
    query_starts: Tensor  # (S + 1,) int32, where each sequence begins in query_Q
    key_starts: Tensor  # (S + 1,) int32
    longest_query: int
    longest_key: int


def packed_sequences(segments_BL: Tensor, device: torch.device | str = "cpu") -> Sequences:
    """The prompt over itself, and each completion over [prompt, own], causal with the last query at
    the last key. Padding asks nothing; it gets 0."""
    places_BL = torch.arange(segments_BL.numel()).view(segments_BL.shape)
    queries, keys = [], []
    for places_L, segments_L in zip(places_BL, segments_BL, strict=True):
        prompt = places_L[segments_L == 0]
        queries.append(prompt)
        keys.append(prompt)
        for i in range(1, int(segments_L.max()) + 1):
            own = places_L[segments_L == i]
            if len(own):  # a completion of one token has nothing that predicts
                queries.append(own)
                keys.append(torch.cat([prompt, own]))

    def starts(parts: list[Tensor]) -> Tensor:
        ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        return F.pad(ends, (1, 0)).to(device, torch.int32)

    return Sequences(
        torch.cat(queries).to(device),
        torch.cat(keys).to(device),
        starts(queries),
        starts(keys),
        max(map(len, queries)),
        max(map(len, keys)),
    )


def flash_attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: Sequences | None = None,
    **_,
) -> tuple[Tensor, None]:
    """As `packed_attention`; the layout is that of `packed_sequences`."""
    from flash_attn import flash_attn_varlen_func

    if packed is None:
        return packed_attention(module, query, key, value, attention_mask, scaling=scaling)
    B, H, L, d = query.shape
    query, key, value = (
        x.to(value.dtype).transpose(1, 2).reshape(B * L, -1, d) for x in (query, key, value)
    )
    out = flash_attn_varlen_func(
        query[packed.query_Q],
        key[packed.key_K],
        value[packed.key_K],
        packed.query_starts,
        packed.key_starts,
        packed.longest_query,
        packed.longest_key,
        softmax_scale=scaling,
        causal=True,
    )
    rows = torch.zeros_like(query).index_copy(0, packed.query_Q, out)
    return rows.view(B, L, H, d), None


# --attn_implementation: the attention of the language model, and the layout it takes. (A name with
# "flash" in it would have transformers look for a library of that name.)
ATTENTION = {
    "sdpa": ("packed_sdpa", packed_layout),
    "flash_attention_2": ("packed_varlen", packed_sequences),
}
AttentionInterface.register("packed_sdpa", packed_attention)
AttentionInterface.register("packed_varlen", flash_attend)
