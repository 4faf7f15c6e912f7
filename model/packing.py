"""One question with its G completions as one row [prompt | c_1 | c_2 | ... | c_G], and attention
over it, so that the prompt is scored once instead of G times.

A token of c_i sees the prompt and its own earlier tokens, at the positions it would have alone.
There are two ways to compute that, which give the same numbers; neither makes a mask:

    sdpa                torch's fused attention, for the prompt and for its completions: everywhere
    flash_attention_2   flash-attn's variable-length call: the prompt is one sequence, each
                        completion another, over [prompt, own]; no padding; CUDA, its own package

Letters in shapes: B questions, b of them with prompts of one length P, G completions of each, T
tokens of the longest, L tokens of the longest row, N completion tokens of a question, H query
heads, d their size, S sequences in a variable-length call, Q tokens that ask in it, K tokens they
may see.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
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
class SamePrompts:
    """Questions of a batch whose prompts have one length, and where their completions stand."""

    rows: Tensor  # (b,) int64: which of the B questions
    prompt_length: int
    places_bGT: Tensor  # in the B L tokens of the flattened rows, right-padded with 0
    real_n: Tensor  # which of the b G T are completion tokens, not padding


def packed_layout(segments_BL: Tensor, device: torch.device | str = "cpu") -> list[SamePrompts]:
    """Eq. 7 as `packed_attention` wants it: no mask, because padding comes last in each sequence,
    where causal attention never looks."""
    lengths = (segments_BL == 0).sum(1)
    places_BL = torch.arange(segments_BL.numel()).view(segments_BL.shape)
    parts = []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        G = int(segments_BL[rows].max())
        own = [places_BL[b][segments_BL[b] == i] for b in rows for i in range(1, G + 1)]
        if any(map(len, own)):
            padded = pad_sequence(own, batch_first=True, padding_value=-1)
            real_n = (padded.flatten() >= 0).nonzero()[:, 0].to(device)
            places = padded.clamp(min=0).view(len(rows), G, -1).to(device)
        else:  # every completion has one token, and nothing follows it
            places, real_n = torch.zeros(len(rows), G, 0, dtype=torch.long, device=device), None
        parts.append(SamePrompts(rows.to(device), length, places, real_n))
    return parts


def packed_attention(module, query, key, value, attention_mask, *, scaling, packed=None, **_):
    """Attention over packed rows, as transformers calls it: query (B, H, L, d), key and value with
    fewer heads; returns (B, L, H, d). `packed` is the layout; without one, as in a prefill of
    prompts alone, this is transformers' own causal attention.

    The prompt attends to itself once. The completions of a question attend to the prompt, whose
    keys they share, and each to itself; `Joined` makes one softmax of the two. Time and memory grow
    with the number of completions, not with its square.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast they are float32
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    (B, H, L, d), heads = query.shape, key.shape[1]
    flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = query.new_zeros(B, L, H, d)
    for part in packed:
        P, (b, G, T) = part.prompt_length, part.places_bGT.shape
        prompt = [x if b == B else x[part.rows] for x in (query, key, value)]
        prompt = [x[:, :, :P] for x in prompt]
        prompt_out = F.scaled_dot_product_attention(
            *prompt, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
        out = out.index_put((part.rows[:, None], torch.arange(P, device=out.device)), prompt_out)
        if T:
            q, k, v = (
                x.index_select(0, part.places_bGT.flatten()) for x in (flat_q, flat_k, flat_v)
            )
            q = q.view(b, G, T, heads, H // heads, d)
            k, v = (x.view(b, G, T, heads, d) for x in (k, v))
            own_out = Joined.apply(q, prompt[1], prompt[2], k, v, scaling).reshape(b * G * T, H, d)
            places = part.places_bGT.flatten()[part.real_n]
            out = out.flatten(0, 1).index_copy(0, places, own_out[part.real_n]).view(B, L, H, d)
    return out, None


class Joined(torch.autograd.Function):
    """Attention of completion tokens over [prompt, own], in two parts with one softmax.

    q (b, G, T, heads, shared, d) of G completions; the prompt's k and v (b, heads, P, d); the
    completions' own (b, G, T, heads, d). Returns the shape of q.

    With o_1, o_2 the parts' outputs and L_1, L_2 their log-sum-exps, L = log(e^L_1 + e^L_2) and
    o = e^(L_1 - L) o_1 + e^(L_2 - L) o_2. The probabilities of each part are e^(score - L), so its
    fused backward pass, given o and L in place of its own, returns the exact gradients.
    """

    @staticmethod
    def to_prompt(x: Tensor) -> Tensor:
        """(b, G, T, heads, shared, n) -> (b, heads, shared G T, n): queries of one key head."""
        b, G, T, heads, shared, n = x.shape
        return x.permute(0, 3, 4, 1, 2, 5).reshape(b, heads, shared * G * T, n)

    @staticmethod
    def to_own(x: Tensor) -> Tensor:
        """(b, G, T, heads, shared, n) -> (b G, heads shared, T, n): each completion by itself."""
        return x.flatten(0, 1).flatten(2, 3).transpose(1, 2)

    @staticmethod
    def from_prompt(x: Tensor, shape: torch.Size) -> Tensor:
        b, G, T, heads, shared, _ = shape
        return x.view(b, heads, shared, G, T, -1).permute(0, 3, 4, 1, 2, 5)

    @staticmethod
    def from_own(x: Tensor, shape: torch.Size) -> Tensor:
        return x.transpose(1, 2).reshape(*shape[:-1], -1)

    @staticmethod
    def forward(ctx, q, prompt_k, prompt_v, k, v, scale):
        shared = q.shape[4]
        own = [x[:, :, :, :, None].expand(-1, -1, -1, -1, shared, -1) for x in (k, v)]
        prompt_k, prompt_v = prompt_k.contiguous(), prompt_v.contiguous()
        out_1, L_1, state_1 = flash(Joined.to_prompt(q), prompt_k, prompt_v, False, scale)
        own = (Joined.to_own(x).contiguous() for x in (q, *own))
        out_2, L_2, state_2 = flash(*own, True, scale)
        out_1, L_1 = (Joined.from_prompt(x, q.shape) for x in (out_1, L_1[..., None]))
        out_2, L_2 = (Joined.from_own(x, q.shape) for x in (out_2, L_2[..., None]))
        L = torch.logaddexp(L_1, L_2)
        out = ((L_1 - L).exp() * out_1 + (L_2 - L).exp() * out_2).to(q.dtype)
        ctx.save_for_backward(q, prompt_k, prompt_v, k, v, out, L)
        ctx.scale, ctx.states = scale, (state_1, state_2)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, prompt_k, prompt_v, k, v, out, L = ctx.saved_tensors
        g, o, l_, q_1 = (Joined.to_prompt(x) for x in (grad, out, L, q))
        dq_1, dprompt_k, dprompt_v = flash_backward(
            g, q_1, prompt_k, prompt_v, o, l_[..., 0], False, ctx.scale, ctx.states[0]
        )
        own = [x[:, :, :, :, None].expand_as(q) for x in (k, v)]
        g, o, l_, q_2, k_2, v_2 = (Joined.to_own(x).contiguous() for x in (grad, out, L, q, *own))
        dq_2, dk_2, dv_2 = flash_backward(
            g, q_2, k_2, v_2, o, l_[..., 0], True, ctx.scale, ctx.states[1]
        )
        dq_2, dk, dv = (Joined.from_own(x, q.shape) for x in (dq_2, dk_2, dv_2))
        dq = Joined.from_prompt(dq_1, q.shape) + dq_2
        return dq, dprompt_k, dprompt_v, dk.sum(4), dv.sum(4), None


def flash(q, k, v, is_causal: bool, scale: float) -> tuple[Tensor, Tensor, tuple]:
    """Torch's fused attention: output (b, H, n, d), log-sum-exp (b, H, n) in float32, and what its
    backward pass on CUDA wants besides. On CUDA for bf16 and float16 only."""
    if q.is_cuda:
        out, L, *rest = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, is_causal, scale=scale
        )
        return out, L, tuple(rest[:6])
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return *attend(q, k, v, 0.0, is_causal, scale=scale), ()


def flash_backward(grad, q, k, v, out, L, is_causal: bool, scale: float, state: tuple):
    """The gradients of q, k and v, for an output and log-sum-exp that may be of more keys."""
    if q.is_cuda:
        starts, seeds = state[:4], state[4:]
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, L, *starts, 0.0, is_causal, *seeds, scale=scale
        )
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, L, 0.0, is_causal, scale=scale
    )


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
        torch.cat(queries).to(device), torch.cat(keys).to(device),
        starts(queries), starts(keys), max(map(len, queries)), max(map(len, keys)),
    )  # fmt: skip


def flash_attend(module, query, key, value, attention_mask, *, scaling, packed=None, **_):
    """As `packed_attention`; the layout is that of `packed_sequences`."""
    from flash_attn import flash_attn_varlen_func

    if packed is None:
        return packed_attention(module, query, key, value, attention_mask, scaling=scaling)
    B, H, L, d = query.shape
    query, key, value = (
        x.to(value.dtype).transpose(1, 2).reshape(B * L, -1, d) for x in (query, key, value)
    )
    out = flash_attn_varlen_func(
        query[packed.query_Q], key[packed.key_K], value[packed.key_K],
        packed.query_starts, packed.key_starts, packed.longest_query, packed.longest_key,
        softmax_scale=scaling, causal=True,
    )  # fmt: skip
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
