"""Samples G completions per question: attention over the KV cache, and the decode step.

A prompt's keys and values are cached once per question, a completion's once per row. Repeating the
cache G times would store the prompt, by far the longer part, G times, and every step would read
all of it.

All tensors of a decode step keep their address and shape from step to step, so on a GPU one step
can be captured as a CUDA graph and replayed: launching the kernels of a 7B model one by one costs
more than running them. Run eagerly, the same function gives the same tokens.

Shape letters: B questions, G completions of each, R = B G rows decoded together, P prompt tokens,
T tokens of a completion, t the position being sampled, H query heads, K key heads, d head size,
V vocabulary, D hidden size.
"""

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from data import Question

if TYPE_CHECKING:
    from model.policy import Policy

CHECK_EVERY = 16  # steps on a GPU between checks whether all rows have ended
WORDS = 512  # vocabulary words per block in `draw`


def rotated(x_RHd: Tensor, cos_Rd: Tensor, sin_Rd: Tensor) -> Tensor:
    """Rotary embedding: features j and j + d / 2 rotate as a pair."""
    first, second = x_RHd.chunk(2, dim=-1)
    turned_RHd = torch.cat([-second, first], dim=-1)
    return x_RHd * cos_Rd[:, None] + turned_RHd * sin_Rd[:, None]


def group_attention(
    query_RHd: Tensor,
    key_RKd: Tensor,
    value_RKd: Tensor,
    cos_Rd: Tensor,
    sin_Rd: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths_B: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    t: Tensor,
    scale: float,
) -> Tensor:
    """Eq. 35: attention of one new token per row over [its question's prompt, its own completion].

    query, key and value are the new token's, before rotary embedding; cos and sin are those of its
    position. The prompts' keys and values are (B, K, P, d), of which lengths_B are valid; the
    completions' are (R, K, T, d), and the new ones are written at position t, (1,) int64. The G
    rows of a question, and the H / K query heads that share a key head, form one matrix product
    with the prompt's keys. Always in float32, even under autocast. Returns (R, H, d) in the cache's
    dtype. Synchronises to read t; `kernels.decode` does not.
    """
    (R, H, d), (B, K, P, _), W = query_RHd.shape, prompt_key.shape, int(t) + 1
    wide = torch.promote_types(torch.float32, own_key.dtype)
    own_key.index_copy_(2, t, rotated(key_RKd, cos_Rd, sin_Rd)[:, :, None].to(own_key.dtype))
    own_value.index_copy_(2, t, value_RKd[:, :, None].to(own_value.dtype))
    key, value, prompt_key, prompt_value = (
        x.to(wide) for x in (own_key[:, :, :W], own_value[:, :, :W], prompt_key, prompt_value)
    )

    def by_question(x: Tensor) -> Tensor:  # (R, K, H / K, n) -> (B, K, G H / K, n)
        return x.reshape(B, R // B, K, H // K, -1).transpose(1, 2).flatten(2, 3)

    def by_row(x: Tensor) -> Tensor:  # and back
        return x.unflatten(2, (R // B, H // K)).transpose(1, 2).flatten(0, 1)

    padding_BP = torch.arange(P, device=t.device) >= lengths_B[:, None]
    with torch.autocast(t.device.type, enabled=False):
        q_own = rotated(query_RHd, cos_Rd, sin_Rd).to(wide).view(R, K, H // K, d) * scale
        to_prompt = by_question(q_own) @ prompt_key.mT
        to_prompt = to_prompt.masked_fill(padding_BP[:, None, None], -torch.inf)
        to_own = by_question(q_own @ key.mT)
        p_prompt, p_own = torch.cat([to_prompt, to_own], -1).softmax(-1).split([P, W], -1)
        out = by_row(p_prompt @ prompt_value) + by_row(p_own) @ value
    return out.reshape(R, H, d).to(own_value.dtype)


def attention_on(device: torch.device) -> Callable[..., Tensor]:
    """The kernel on CUDA if Triton is installed, else `group_attention`."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from kernels.decode import decode_attention

        return decode_attention
    return group_attention


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """One kernel, in x's dtype with float32 inside; the module's own forward launches eight."""
    with torch.autocast(x.device.type, enabled=False):  # it would cast to float32 and back
        return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def decode_layer(
    layer: nn.Module, hidden_RD: Tensor, attend: Callable[..., Tensor], context: tuple[Tensor, ...]
) -> Tensor:
    """Runs one of transformers' decoder layers on one token per row.

    Not by its own forward, which rotates queries and keys in ten kernels before calling attention.
    `context` holds the arguments of `attend` between the value and the scale.
    """
    attention = layer.self_attn
    x_RD = rms_norm(layer.input_layernorm, hidden_RD)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (p(x_RD).view(len(x_RD), -1, attention.head_dim) for p in projections)
    if hasattr(attention, "q_norm"):  # Qwen3-VL
        query, key = rms_norm(attention.q_norm, query), rms_norm(attention.k_norm, key)
    out_RHd = attend(query, key, value, *context, attention.scaling)
    hidden_RD = hidden_RD + attention.o_proj(out_RHd.flatten(1))
    return hidden_RD + layer.mlp(rms_norm(layer.post_attention_layernorm, hidden_RD))


def sample(
    logits_RV: Tensor,
    temperature: float,
    uniform_R: Tensor,
    banned_V: Tensor,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Eq. 5: one token per row and its log-prob, ((R,) int64, (R,) float32). Temperature 0 is
    greedy.

    Each row inverts its cumulative distribution at its own uniform number in [0, 1), so a draw
    depends only on its row. No top-k or top-p in training: the gradient assumes samples from the
    full softmax. (Evaluation may set top_p, for nucleus sampling.)
    OFFICIAL: transformers' default top_k = 50 slips in.
    """
    logits_RV = logits_RV.float() / (temperature or 1.0)
    logps_RV = F.log_softmax(logits_RV, dim=-1)
    # Banned words keep their (tiny) probability in the log-prob, to match scoring.
    allowed_RV = logits_RV.masked_fill(banned_V, -torch.inf)
    if top_p < 1:
        sorted_RV, order_RV = allowed_RV.sort(dim=-1, descending=True)
        share_RV = F.softmax(sorted_RV, dim=-1)
        ahead_RV = share_RV.cumsum(-1) - share_RV  # total probability of the likelier words
        kept_RV = sorted_RV.masked_fill(ahead_RV >= top_p, -torch.inf)
        allowed_RV = allowed_RV.scatter(-1, order_RV, kept_RV)
    if temperature == 0:
        tokens_R = allowed_RV.argmax(-1)
    else:
        tokens_R = draw(F.softmax(allowed_RV, dim=-1), uniform_R)
    return tokens_R, logps_RV.gather(1, tokens_R[:, None])[:, 0]


def draw(share_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The first word whose cumulative probability exceeds uniform times the total, (R,) int64.

    In two levels, because a GPU is slow to scan a row of 152,064 words: first the block of words
    where the sum is exceeded, then the word. Sums are float64; within rounding (1e-15) of the
    boundary between two words, either may be drawn.
    """
    R, V = share_RV.shape
    share_RNW = F.pad(share_RV, (0, -V % WORDS)).view(R, -1, WORDS)
    upto_RN = share_RNW.sum(-1, dtype=torch.float64).cumsum(-1)
    at_R1 = uniform_R[:, None] * upto_RN[:, -1:]
    block_R1 = first_above(upto_RN, at_R1)
    before_R1 = F.pad(upto_RN, (1, 0)).gather(1, block_R1)
    share_RW = share_RNW.gather(1, block_R1[..., None].expand(-1, -1, WORDS))[:, 0]
    word_R1 = first_above(share_RW.cumsum(-1, dtype=torch.float64), at_R1 - before_R1)
    # Only a NaN can be out of range; its log-prob is NaN too and makes the rollout fail.
    return (block_R1 * WORDS + word_R1)[:, 0].clamp(max=V - 1)


def first_above(upto_RN: Tensor, at_R1: Tensor) -> Tensor:
    """The first index at which a row's cumulative sum exceeds `at`, (R, 1); never an entry of 0.
    If rounding takes `at` to the row's total, this is its last nonzero entry."""
    at_R1 = torch.minimum(at_R1, upto_RN[:, -1:] * (1 - 2**-52))
    return torch.searchsorted(upto_RN, at_R1, right=True).clamp(max=upto_RN.shape[1] - 1)


def head_logits(hidden_RD: Tensor, weight_VD: Tensor) -> Tensor:
    """Float32 logits, even from bf16 inputs: rounding them to bf16 would change the softmax."""
    with torch.autocast(hidden_RD.device.type, enabled=False):
        hidden_RD = hidden_RD.to(weight_VD.dtype)
        if weight_VD.dtype == torch.float32:
            return hidden_RD @ weight_VD.T
        return torch.mm(hidden_RD, weight_VD.T, out_dtype=torch.float32)


class Decoder:
    """The state of a rollout after prefill, and the step that advances all R rows by one token.

    Row r belongs to question r // G and samples with uniform_RT[r].
    """

    def __init__(
        self,
        policy: "Policy",
        questions: list[Question],
        prefill: BaseModelOutputWithPast,
        uniform_RT: Tensor,
        temperature: float,
        top_p: float,
    ):
        (R, T), B, device = uniform_RT.shape, len(questions), policy.device
        self.text, self.lm_head = policy.text, policy.model.lm_head
        self.banned_V, self.eos_ids = policy.banned_V.to(device), policy.eos_ids.to(device)
        self.temperature, self.top_p = temperature, top_p
        self.uniform_RT, self.attend = uniform_RT.to(device), attention_on(device)
        following_B = torch.stack([q.positions_3P.max() + 1 for q in questions])
        self.following_R = following_B.repeat_interleave(R // B).to(device)
        self.lengths_B = torch.tensor([len(q.ids_P) for q in questions], device=device)
        cached = prefill.past_key_values.layers
        self.prompt = [(layer.keys.contiguous(), layer.values.contiguous()) for layer in cached]
        self.own = [
            tuple(x.new_zeros(R, x.shape[1], T, x.shape[3]) for x in pair) for pair in self.prompt
        ]
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens_RT = torch.zeros(R, T, dtype=torch.long, device=device)
        self.logps_RT = torch.zeros(R, T, device=device)
        self.ended_R = torch.zeros(R, dtype=torch.bool, device=device)
        at_B = torch.arange(B, device=device)
        hidden_BD = prefill.last_hidden_state[at_B, self.lengths_B - 1]
        self._sample(hidden_BD.repeat_interleave(R // B, dim=0))

    def _sample(self, hidden_RD: Tensor) -> None:
        """Samples column t of tokens and log-probs from the hidden states that predict it."""
        uniform_R = self.uniform_RT.index_select(1, self.t)[:, 0]
        logits_RV = head_logits(hidden_RD, self.lm_head.weight)
        tokens_R, logps_R = sample(
            logits_RV, self.temperature, uniform_R, self.banned_V, self.top_p
        )
        self.tokens_RT.index_copy_(1, self.t, tokens_R[:, None])
        self.logps_RT.index_copy_(1, self.t, logps_R[:, None])
        self.ended_R |= torch.isin(tokens_R, self.eos_ids)

    def step(self) -> None:
        """Feeds in column t and samples column t + 1."""
        hidden_RD = self.text.embed_tokens(self.tokens_RT.index_select(1, self.t)[:, 0])
        positions_3R1 = (self.following_R + self.t).expand(3, -1)[..., None]
        rotation = [x_R1d[:, 0] for x_R1d in self.text.rotary_emb(hidden_RD, positions_3R1)]
        for layer, prompt, own in zip(self.text.layers, self.prompt, self.own, strict=True):
            context = (*rotation, *prompt, self.lengths_B, *own, self.t)
            hidden_RD = decode_layer(layer, hidden_RD, self.attend, context)
        self.t += 1
        self._sample(rms_norm(self.text.norm, hidden_RD))

    def run(self) -> tuple[Tensor, Tensor]:
        """Decodes until every row has ended. Returns tokens and log-probs, (R, T), zeros where no
        step was needed. On CUDA, each step replays a graph."""
        T, step, on_cuda = self.uniform_RT.shape[1], self.step, self.t.is_cuda
        for t in range(T - 1):
            if t % (CHECK_EVERY if on_cuda else 1) == 0 and self.ended_R.all():  # waits for the GPU
                break
            if t == 0 and on_cuda and self.attend is not group_attention:
                step = self._captured_step()
            step()
        return self.tokens_RT, self.logps_RT

    def _captured_step(self) -> Callable[[], None]:
        """One step as a CUDA graph.

        Capture runs nothing, but the warm-up before it does, so the state it changes is restored.
        Whatever it writes beyond column t, the replays overwrite.
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
