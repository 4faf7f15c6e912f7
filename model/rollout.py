"""Sampling G completions of each question: the cache, the attention over it, and one decode step.

Every tensor of a decode step keeps its address and shape from step to step, so that on a GPU one
step can be captured as a graph and replayed: launching the kernels of a 7B model one by one costs
more than running them. Eagerly the same function gives the same tokens.

Letters in shapes: B questions, G completions of each, R = B G rows decoded side by side, P prompt
tokens, T tokens of a completion, t the position being sampled, W >= t + 1 the part of the cache
that a step reads, H query heads, d their size, V vocabulary, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

FIRST_WIDTH = 64  # W doubles from here, so a rollout captures few graphs and reads at most 2 t


class GroupCache:
    """Keys and values while decoding: a prompt's once per question, a completion's once per row.

    A cache repeated G times would hold the prompt, by far the longer part, G times, and every step
    would read all of it. transformers fills this one through `update`; `group_attention` reads it.
    """

    def __init__(self, layers: int, num_generations: int, length: int, real_BP: Tensor):
        self.num_generations, self.length = num_generations, length
        # Added to scores: 0 where there is something to see, -inf where there is not.
        self.unreal_B11P = torch.zeros_like(real_BP, dtype=torch.float32)
        self.unreal_B11P = self.unreal_B11P.masked_fill(~real_BP, -torch.inf)[:, None, None]
        self.prompt: list[tuple[Tensor, Tensor] | None] = [None] * layers  # (B, heads, P, d)
        self.own: list[tuple[Tensor, Tensor] | None] = [None] * layers  # (R, heads, length, d)
        self.t: Tensor | None = None  # (1,) int64, the position being written; None: prefill
        self.width = 0

    def begin_decoding(self, t: Tensor) -> None:
        self.t = t
        for layer, (key, value) in enumerate(self.prompt):
            B, heads, _, d = key.shape
            shape = (B * self.num_generations, heads, self.length, d)
            # Each in its own dtype: under autocast, a float32 model has float32 keys, bf16 values.
            self.own[layer] = (key.new_zeros(shape), value.new_zeros(shape))

    def unwritten_W(self) -> Tensor:
        """-inf at the positions of the own cache that are read but not yet written, else 0."""
        position_W = torch.arange(self.width, device=self.t.device)
        return torch.where(position_W <= self.t, 0.0, -torch.inf)

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if self.t is None:
            self.prompt[layer_idx] = (key, value)
            return key, value
        for buffer, new in zip(self.own[layer_idx], (key, value), strict=True):
            buffer.index_copy_(2, self.t, new)
        return tuple(buffer[:, :, : self.width] for buffer in self.own[layer_idx])


def group_attention(module, query, key, value, attention_mask, *, scaling, group_cache, **_):
    """Attention of one new token per row over [prompt of its question, its own completion].

    query (R, H, 1, d); key and value (R, heads, W, d) are the row's own, not all written yet; the
    prompt's come from the cache. The G rows of a question, and the H / heads query heads that share
    a key head, are rows of one matrix product with the prompt's keys. In float32, autocast or not.
    Returns (R, 1, H, d), as transformers wants it.
    """
    (R, H, _, d), (_, heads, W, _), dtype = query.shape, key.shape, query.dtype
    prompt_key, prompt_value = group_cache.prompt[module.layer_idx]
    B, G, shared, P = len(prompt_key), group_cache.num_generations, H // heads, prompt_key.shape[2]
    query, key, value, prompt_key, prompt_value = (
        x.float() for x in (query, key, value, prompt_key, prompt_value)
    )

    def by_question(x: Tensor) -> Tensor:  # (R, heads, shared, n) -> (B, heads, G * shared, n)
        return x.view(B, G, heads, shared, -1).transpose(1, 2).reshape(B, heads, G * shared, -1)

    def by_row(x: Tensor) -> Tensor:  # and back
        return x.reshape(B, heads, G, shared, -1).transpose(1, 2).reshape(R, heads, shared, -1)

    with torch.autocast(query.device.type, enabled=False):
        q_own = query.view(R, heads, shared, d) * scaling
        to_prompt = by_question(q_own) @ prompt_key.mT + group_cache.unreal_B11P
        to_own = by_question(q_own @ key.mT + group_cache.unwritten_W())
        p_prompt, p_own = torch.cat([to_prompt, to_own], -1).softmax(-1).split([P, W], -1)
        out = by_row(p_prompt @ prompt_value) + by_row(p_own) @ value
    return out.reshape(R, 1, H, d).to(dtype), None


AttentionInterface.register("group", group_attention)


def sample(
    logits_RV: Tensor,
    temperature: float,
    uniform_R: Tensor,
    banned_V: Tensor,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Eq. 5: one token per row and its log-prob, ((R,) int64, (R,) float32). Temperature 0 takes
    the best.

    Each row inverts its cumulative distribution at its own uniform number in [0, 1), so the draw
    depends on nothing but that row. No top-k and no top-p: the gradient assumes that the whole
    softmax was sampled. (Evaluation may set top_p: the likeliest words that together hold it.)
    OFFICIAL: transformers' default top_k = 50 slips in.
    """
    logits_RV = logits_RV.float() / (temperature or 1.0)
    logps_RV = F.log_softmax(logits_RV, dim=-1)
    # Banned words keep their (vanishing) share in the log-prob, as they do when it is scored.
    allowed_RV = logits_RV.masked_fill(banned_V, -torch.inf)
    if top_p < 1:
        sorted_RV, order_RV = allowed_RV.sort(dim=-1, descending=True)
        share_RV = F.softmax(sorted_RV, dim=-1)
        ahead_RV = share_RV.cumsum(-1) - share_RV  # what the likelier words hold
        kept_RV = sorted_RV.masked_fill(ahead_RV >= top_p, -torch.inf)
        allowed_RV = allowed_RV.scatter(-1, order_RV, kept_RV)
    if temperature == 0:
        tokens_R = allowed_RV.argmax(-1)
    else:
        mass_RV = F.softmax(allowed_RV, dim=-1).double().cumsum(-1)
        at_R1 = (uniform_R * mass_RV[:, -1])[:, None]
        tokens_R = torch.searchsorted(mass_RV, at_R1, right=True)[:, 0]
        # Only NaN logits can lie beyond. The log-prob is NaN too, and ends the rollout.
        tokens_R = tokens_R.clamp(max=len(banned_V) - 1)
    return tokens_R, logps_RV.gather(1, tokens_R[:, None])[:, 0]


def head_logits(hidden_RD: Tensor, weight_VD: Tensor) -> Tensor:
    """Float32 logits, also from bf16 factors: rounded to bf16 they would sample another softmax."""
    with torch.autocast(hidden_RD.device.type, enabled=False):
        hidden_RD = hidden_RD.to(weight_VD.dtype)
        if weight_VD.dtype == torch.float32:
            return hidden_RD @ weight_VD.T
        return torch.mm(hidden_RD, weight_VD.T, out_dtype=torch.float32)


class Decoder:
    """The state of a rollout after its prefill, and the step that moves all R rows on by one token.

    `run()` decodes until every row has ended and leaves the tokens in `tokens_RT`, their log-probs
    in `logps_RT`, and in `steps` how many columns are filled. With `capture` (CUDA only) each step
    is a replayed graph.
    """

    def __init__(
        self, text, lm_head, cache: GroupCache, hidden_RD: Tensor, following_R: Tensor,
        uniform_RT: Tensor, temperature: float, top_p: float, banned_V: Tensor, eos_ids: Tensor,
    ):  # fmt: skip
        self.text, self.lm_head, self.cache = text, lm_head, cache
        self.following_R, self.uniform_RT = following_R, uniform_RT
        self.temperature, self.top_p = temperature, top_p
        self.banned_V, self.eos_ids = banned_V, eos_ids
        (R, T), device = uniform_RT.shape, hidden_RD.device
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens_RT = torch.zeros(R, T, dtype=torch.long, device=device)
        self.logps_RT = torch.zeros(R, T, device=device)
        self.ended_R = torch.zeros(R, dtype=torch.bool, device=device)
        self.steps = 0
        cache.begin_decoding(self.t)
        self._sample(hidden_RD)

    def _sample(self, hidden_RD: Tensor) -> None:
        """Writes column t of tokens and log-probs from the hidden states that predict it."""
        uniform_R = self.uniform_RT.index_select(1, self.t)[:, 0]
        logits_RV = head_logits(hidden_RD, self.lm_head.weight)
        tokens_R, logps_R = sample(
            logits_RV, self.temperature, uniform_R, self.banned_V, self.top_p
        )
        self.tokens_RT.index_copy_(1, self.t, tokens_R[:, None])
        self.logps_RT.index_copy_(1, self.t, logps_R[:, None])
        self.ended_R |= torch.isin(tokens_R, self.eos_ids)

    def step(self) -> None:
        """Feeds column t, and samples column t + 1."""
        tokens_R1 = self.tokens_RT.index_select(1, self.t)
        hidden_R1D = self.text(
            inputs_embeds=self.text.embed_tokens(tokens_R1),
            position_ids=(self.following_R + self.t).expand(3, -1)[..., None],
            attention_mask=None,
            past_key_values=self.cache,
            group_cache=self.cache,
        ).last_hidden_state
        self.t += 1
        self._sample(hidden_R1D[:, 0])

    def run(self, capture: bool, check_every: int) -> None:
        T, step = self.uniform_RT.shape[1], None
        for t in range(T - 1):
            if t % check_every == 0 and bool(self.ended_R.all()):  # waits for the GPU
                break
            if t >= self.cache.width:
                self.cache.width = min(max(FIRST_WIDTH, 2 * self.cache.width), self.cache.length)
                step = self._captured_step() if capture else self.step
            step()
            self.steps = t + 1
        self.steps += 1

    def _captured_step(self):
        """One step as a CUDA graph, over the first `cache.width` positions.

        Capturing runs nothing, but the warm-up before it does: the state it moves is put back. What
        it writes beyond column t is written again by the replays.
        """
        state = (self.t, self.ended_R)
        before = [x.clone() for x in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        for x, value in zip(state, before, strict=True):
            x.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay
