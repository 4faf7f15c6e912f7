"""One question with its G completions as one row [prompt | c_1 | c_2 | ... | c_G], and attention
over it, so that the prompt is scored once instead of G times.

A token of c_i sees the prompt and its own earlier tokens, at the positions it would have alone.
The rest can be hidden from it in three ways, which give the same numbers:

    sdpa                torch's attention with a boolean mask: everywhere; computes what it hides
    flex_attention      torch's compiled attention: CUDA; skips blocks of 128 x 128 that are hidden
    flash_attention_2   flash-attn's variable-length call, which needs no mask: the prompt is one
                        sequence, each completion another, over [prompt, own]; CUDA, its own package

Letters in shapes: B questions, G completions of each, L tokens of the longest row, N completion
tokens of a question, H query heads, d their size, S sequences in a variable-length call, Q tokens
that ask in it, K tokens they may see.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from data import Question


@dataclass
class Group:
    """One question and the G completions sampled for it."""

    question: Question
    completions: list[Tensor]  # G vectors of int64 token ids, the end token included where one came
    finished: list[bool]  # G; False: cut off at the length limit
    texts: list[str]  # G, decoded without special tokens
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
        rows_N.append(torch.cat(predictors))
    L = max(len(ids) for ids in rows_ids)
    return (
        torch.stack([F.pad(x, (0, L - len(x)), value=pad_id) for x in rows_ids]),
        torch.stack([F.pad(x, (0, L - x.shape[1])) for x in rows_positions], dim=1),
        torch.stack([F.pad(x, (0, L - len(x)), value=-1) for x in rows_segments]),
        rows_N,
    )


# ------------------------------------------------------------------------------ sdpa: a dense mask


def packed_mask(segments_BL: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Eq. 7: who sees whom, (B, 1, L, L) bool. A token sees the prompt and its segment, up to
    itself."""
    segments_BL, L = segments_BL.to(device), segments_BL.shape[1]
    key, query = segments_BL[:, None, :], segments_BL[:, :, None]
    causal = torch.ones(L, L, dtype=torch.bool, device=device).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]


# ------------------------------------------------------------------- flex_attention: block by block


@functools.cache
def compiled(function):
    """Compiled for rows of any length; an error, not a slow fall-back, where that fails. One
    question or several, a row of one block or more, with gradient or without: each of these is
    compiled by itself, about a dozen in all, where 8 would be allowed."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=True, fullgraph=True)


def packed_rule(segments_BL: Tensor):
    """The same rule, one pair at a time."""

    def sees(b, h, query, key):
        segment = segments_BL[b, key]
        return (query >= key) & ((segment == 0) | (segment == segments_BL[b, query]))

    return sees


def packed_blocks(segments_BL: Tensor, device: torch.device | str = "cpu") -> BlockMask:
    """The rule, and a list of the blocks in which anything is seen. Making it looks at all L x L
    pairs once, in bytes; on CUDA compiled, block by block."""
    (B, L), segments_BL = segments_BL.shape, segments_BL.to(device)
    make = compiled(create_block_mask) if segments_BL.is_cuda else create_block_mask
    return make(packed_rule(segments_BL), B, None, L, L, device=device)


def flex_attend(module, query, key, value, attention_mask, *, scaling, **_):
    """As transformers calls an attention function: query (B, H, L, d), key and value with fewer
    heads, attention_mask from `packed_blocks`. Returns (B, L, H, d)."""
    attend = compiled(flex_attention) if query.is_cuda else flex_attention
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


# ---------------------------------------------------------------- flash_attention_2: no mask at all


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
    """The prompt over itself, and each completion over [prompt, own]. Causal, and with the last
    query at the last key, that is the rule of `packed_mask`. Padding asks nothing; it gets 0."""
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


def flash_attend(module, query, key, value, attention_mask, *, scaling, **_):
    """As `flex_attend`; attention_mask from `packed_sequences`."""
    from flash_attn import flash_attn_varlen_func

    (B, H, L, d), packed = query.shape, attention_mask
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


# --attn_implementation: what transformers is to call, and what that takes for a mask. (A name with
# "flash" in it would have transformers look for a library of that name.)
ATTENTION = {
    "sdpa": ("sdpa", packed_mask),
    "flex_attention": ("packed_flex", packed_blocks),
    "flash_attention_2": ("packed_varlen", packed_sequences),
}
AttentionInterface.register("packed_flex", flex_attend)
AttentionInterface.register("packed_varlen", flash_attend)


# ------------------------------------------------------- the vision tower: attention within windows


@dataclass
class Segments:
    """A sequence of N tokens cut into segments that attend only within themselves."""

    runs: list[tuple[int, int]]  # neighbours of one length: how many, how many tokens each
    order_N: Tensor | None = None  # int64: where their tokens are; None: as they stand
    back_N: Tensor | None = None  # its inverse


def runs_of(lengths: Tensor) -> list[tuple[int, int]]:
    length, count = lengths.unique_consecutive(return_counts=True)
    return list(zip(count.tolist(), length.tolist(), strict=True))


def tower_layout(grids_B3: Tensor, config, device: torch.device) -> dict:
    """What the vision tower works out from the grids of its clips, as keywords that hand it over.

    Left to itself it reads the window lengths from the GPU in every layer, and calls attention once
    per window: 2,120 calls for a clip of the recipe. Here windows are sorted by length. Lengths
    given as 0 are not asked for either.
    """
    merge, unit = config.spatial_merge_size, config.spatial_merge_size**2
    lengths = get_vision_cu_seqlens(grids_B3).diff()  # of the frames: full attention is within one
    layout = dict(cu_seqlens=Segments(runs_of(lengths)), max_seqlen=0)
    layout["position_ids"] = get_vision_position_ids(grids_B3, merge).to(device)
    if hasattr(config, "num_position_embeddings"):  # Qwen3-VL: learned positions, interpolated
        places, shares = get_vision_interpolation_indices_and_weights(
            grids_B3, int(config.num_position_embeddings**0.5), align_corners=True,
            spatial_merge_size=merge,
        )  # fmt: skip
        layout |= dict(interp_indices=places.to(device), interp_weights=shares.to(device))
    if hasattr(config, "window_size"):  # Qwen2.5-VL
        index, starts = get_vision_window_index(
            grids_B3, merge, config.window_size, config.patch_size
        )
        sizes, by_length = starts.diff().sort(stable=True)
        windows = index.split((starts.diff() // unit).tolist())
        index = torch.cat([windows[k] for k in by_length.tolist()])
        frame_of = torch.repeat_interleave(lengths // unit)[index]
        order_N = (frame_of.argsort(stable=True)[:, None] * unit + torch.arange(unit)).flatten()
        layout |= dict(
            window_index=index.to(device),
            cu_seqlens=Segments(runs_of(lengths), order_N.to(device), order_N.argsort().to(device)),
            cu_window_seqlens=Segments(runs_of(sizes)),
            max_window_seqlen=0,
        )
    return layout


def attend_within(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, **_):
    """Attention of each token over its own segment, neighbours of one length as one batch.

    query, key, value (1, H, N, d); `cu_seq_lens_q` is the Segments from `tower_layout`. Returns
    (1, N, H, d).
    """
    segments, parts = cu_seq_lens_q, []
    qkv = [x[0].transpose(0, 1) for x in (query, key, value)]
    if segments.order_N is not None:
        qkv = [x[segments.order_N] for x in qkv]
    sizes = [count * length for count, length in segments.runs]
    for run, *three in zip(segments.runs, *(x.split(sizes) for x in qkv), strict=True):
        batch = (x.unflatten(0, run).transpose(1, 2) for x in three)
        out = F.scaled_dot_product_attention(*batch, scale=scaling)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    out = torch.cat(parts)
    return (out if segments.back_N is None else out[segments.back_N])[None], None


# Only a function with "flash" in its name gets a layer's windows in one call, not one by one.
AttentionInterface.register("segments_flash", attend_within)
