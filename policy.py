"""Qwen2.5-VL or Qwen2-VL as a policy: encode each video once, prefill each prompt once, score each
prompt once.

    Policy.encode_videos   patches -> video tokens: one pass of the vision tower for all questions
    Policy.rollout         prompts -> G sampled completions each: prefill once, decode B x G rows
    Policy.hidden_states   completions -> the rows that predict them: one packed row per question

transformers supplies the network; everything that makes a group cheap is here. Position ids come
from `video.py` and are passed explicitly everywhere, because the rule inside transformers has
changed from version to version.

Letters in shapes: B questions, G completions of each, P prompt tokens, L tokens of a packed row, N
completion tokens of a question, R = B G rows that are decoded together, V vocabulary, D hidden
size.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from data import Question, load_chat_template
from video import Geometry

MODEL_TYPES = ("qwen2_5_vl", "qwen2_vl")
PROCESSOR_FILES = (  # not needed here, but saved checkpoints carry them along for others
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)


class ModelError(Exception):
    """A checkpoint that cannot be used. The message names it and says what is wrong."""


@dataclass
class Group:
    """One question and the G completions sampled for it."""

    question: Question
    completions: list[Tensor]  # G vectors of int64 token ids, the end token included where one came
    finished: list[bool]  # G; False: cut off at the length limit
    texts: list[str]  # G, decoded without special tokens
    sampled_logps_N: Tensor | None = (
        None  # (N,) log-probs at the time of sampling; None for given completions
    )

    @property
    def lengths_G(self) -> Tensor:
        return torch.tensor([len(c) for c in self.completions])

    @property
    def targets_N(self) -> Tensor:
        return torch.cat(self.completions)


def pack(groups: list[Group], pad_id: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """One row [prompt | c_1 | c_2 | ... | c_G] per question, right-padded to the longest row.

    Returns ids_BL, positions_3BL, segments_BL and, for each question, rows_N: the places in its row
    whose hidden states predict its completion tokens. Every completion's positions go on from the
    prompt's end, as if it stood there alone. Segments are 0 for the prompt, i for c_i, -1 for
    padding. The last token of a completion predicts nothing and is left out; the first is predicted
    by the prompt's last row, which all G completions share.
    """
    rows_ids, rows_positions, rows_segments, rows_N = [], [], [], []
    for group in groups:
        question = group.question
        ids, positions, segments = (
            [question.ids_P],
            [question.positions_3P],
            [torch.zeros_like(question.ids_P)],
        )
        start, following = len(question.ids_P), question.positions_3P.max() + 1
        predictors = []
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


def packed_mask(segments_BL: Tensor) -> Tensor:
    """Who sees whom: (B, 1, L, L) bool. A token sees the prompt and its segment, up to itself."""
    L = segments_BL.shape[1]
    key, query = segments_BL[:, None, :], segments_BL[:, :, None]
    causal = torch.ones(L, L, dtype=torch.bool, device=segments_BL.device).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]


def sample(
    logits_RV: Tensor,
    temperature: float,
    uniform_R: Tensor,
    banned_V: Tensor,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob: ((R,) int64, (R,) float32). Temperature 0 takes the
    likeliest.

    Each row inverts its cumulative distribution at its own uniform number in [0, 1), so the draw
    depends on nothing but that row. No top-k and no top-p: the gradient assumes that the whole
    softmax was sampled. (Evaluation may set top_p: only the likeliest words that together hold it.)
    OFFICIAL: the checkpoint's generation_config slips in top_k = 50.
    """
    logits_RV = logits_RV.float() / (temperature or 1.0)
    logps_RV = F.log_softmax(logits_RV, dim=-1)
    # Banned words keep their (vanishing) share in the log-prob, as they do when the completion is
    # scored.
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
        tokens_R = torch.searchsorted(mass_RV, (uniform_R * mass_RV[:, -1])[:, None], right=True)[
            :, 0
        ]
    return tokens_R, logps_RV.gather(1, tokens_R[:, None])[:, 0]


class GroupCache:
    """Keys and values while decoding: a prompt's once per question, a completion's once per row.

    A cache repeated G times would hold the prompt, by far the longer part, G times, and every step
    would read all of it. transformers fills this one through `update`; `group_attention` reads it.
    """

    def __init__(self, layers: int, num_generations: int, length: int, real_BP: Tensor):
        self.num_generations, self.length, self.real_BP = num_generations, length, real_BP
        self.prompt: list[tuple[Tensor, Tensor] | None] = [None] * layers  # (B, heads, P, d)
        self.own: list[tuple[Tensor, Tensor] | None] = [None] * layers  # (R, heads, length, d)
        self.t = -1  # the position whose keys are being written; -1 during the prefill

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if self.t < 0:
            self.prompt[layer_idx] = (key, value)
            return key, value
        if self.own[layer_idx] is None:
            R, heads, _, d = key.shape
            self.own[layer_idx] = tuple(key.new_empty(R, heads, self.length, d) for _ in range(2))
        for buffer, new in zip(self.own[layer_idx], (key, value), strict=True):
            buffer[:, :, self.t] = new[:, :, 0]
        return tuple(buffer[:, :, : self.t + 1] for buffer in self.own[layer_idx])


@torch.autocast("cuda", enabled=False)
def group_attention(module, query, key, value, attention_mask, *, scaling, group_cache, **_):
    """Attention of one new token per row over [prompt of its question, its own completion].

    query (R, H, 1, d); key and value (R, heads, t + 1, d) are the row's own; the prompt's come from
    the cache. The G rows of a question, and the H / heads query heads that share a key head, are
    rows of one matrix product with the prompt's keys. In float32, autocast or not. Returns
    (R, 1, H, d), as transformers wants it.
    """
    (R, H, _, d), heads, dtype = query.shape, key.shape[1], query.dtype
    prompt_key, prompt_value = group_cache.prompt[module.layer_idx]
    B, G, shared = len(prompt_key), group_cache.num_generations, H // heads
    query, key, value, prompt_key, prompt_value = (
        x.float() for x in (query, key, value, prompt_key, prompt_value)
    )
    q_own = query.view(R, heads, shared, d) * scaling
    q_prompt = q_own.view(B, G, heads, shared, d).transpose(1, 2).reshape(B, heads, G * shared, d)

    to_prompt = q_prompt @ prompt_key.mT  # (B, heads, G * shared, P)
    to_prompt = to_prompt.masked_fill(~group_cache.real_BP[:, None, None], -torch.inf)
    P = to_prompt.shape[-1]
    to_prompt = to_prompt.view(B, heads, G, shared, P).transpose(1, 2).reshape(R, heads, shared, P)
    to_own = q_own @ key.mT  # (R, heads, shared, t + 1)
    p_prompt, p_own = torch.cat([to_prompt, to_own], -1).softmax(-1).split([P, key.shape[2]], -1)

    p_prompt = p_prompt.view(B, G, heads, shared, P).transpose(1, 2).reshape(B, heads, -1, P)
    from_prompt = (p_prompt @ prompt_value).view(B, heads, G, shared, d).transpose(1, 2)
    out = from_prompt.reshape(R, heads, shared, d) + p_own @ value
    return out.reshape(R, 1, H, d).to(dtype), None


AttentionInterface.register("group", group_attention)


class Policy:
    """A Qwen-VL model with its tokenizer, and the three passes a GRPO step makes through it."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: str
    ):
        self.model, self.tokenizer, self.chat_template = model, tokenizer, chat_template
        self.text, self.vision = model.model.language_model, model.model.visual
        config = model.config
        vision = config.vision_config
        self.geometry = Geometry(
            vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size,
            vision.tokens_per_second if config.model_type == "qwen2_5_vl" else None,
        )  # fmt: skip
        eos = model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        self.eos_ids = torch.tensor(
            sorted({e for e in (*eos, tokenizer.eos_token_id) if e is not None})
        )
        self.pad_id = tokenizer.eos_token_id
        # Never sampled: vision placeholders, which would break the count of video tokens, and ids
        # beyond the tokenizer.
        words = config.text_config.vocab_size
        self.banned_V = torch.arange(words) >= len(tokenizer)
        for name in (
            "video_token_id",
            "image_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
        ):
            self.banned_V[getattr(config, name)] = True
        pad = tokenizer.convert_tokens_to_ids("<|vision_pad|>")
        if pad is not None and pad < words:
            self.banned_V[pad] = True

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        device: torch.device | str = "cpu",
        freeze_vision_modules: bool = False,
    ):
        """A checkpoint directory or hub name, in float32. Raises ModelError if it is no Qwen-VL."""
        name = os.fspath(model_name_or_path)
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        if looks_local and not os.path.isdir(name):
            raise ModelError(
                f"{name}: no such model directory; give a checkpoint directory or a hub name"
            )
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{name}: not a model checkpoint that transformers can read ({_first(error)})"
            ) from error
        if config.model_type not in MODEL_TYPES:
            raise ModelError(
                f"{name}: is a {config.model_type!r} model; {' or '.join(MODEL_TYPES)} is needed"
            )
        if set(config.text_config.layer_types) != {"full_attention"}:
            raise ModelError(f"{name}: has sliding-window layers, which packed rows do not support")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForImageTextToText.from_pretrained(
                name, dtype=torch.float32, attn_implementation="sdpa"
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{name}: its weights or tokenizer cannot be loaded ({_first(error)})"
            ) from error
        policy = cls(model.to(device).eval(), tokenizer, load_chat_template(name, tokenizer))
        if freeze_vision_modules:
            policy.vision.requires_grad_(False)
        return policy

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head_VD(self) -> Tensor:
        return self.model.lm_head.weight

    @property
    def vision_is_frozen(self) -> bool:
        return not next(self.vision.parameters()).requires_grad

    def compute(self) -> contextlib.AbstractContextManager:
        """bf16 arithmetic on CUDA over the float32 parameters; plain float32 elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @contextlib.contextmanager
    def _attention(self, name: str):
        """Another attention function in the language model, for a while."""
        config = self.text.config
        before, config._attn_implementation = config._attn_implementation, name
        try:
            yield
        finally:
            config._attn_implementation = before

    def save(self, directory: Path, processor_from: str | None = None) -> None:
        """An ordinary Hugging Face checkpoint, with the processor files of `processor_from`."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        for name in PROCESSOR_FILES if processor_from else ():
            file = cached_file(processor_from, name, _raise_exceptions_for_missing_entries=False,
                               _raise_exceptions_for_connection_errors=False)  # fmt: skip
            if file:
                shutil.copyfile(file, Path(directory) / name)

    def decode(self, completion: Tensor) -> str:
        return self.tokenizer.decode(completion.tolist(), skip_special_tokens=True)

    def encode_videos(self, questions: list[Question]) -> Tensor:
        """Video tokens of all questions, one after the other: (sum of tokens, D)."""
        patches = torch.cat([q.patches for q in questions]).to(self.device)
        grids = torch.tensor([q.grid for q in questions], device=self.device)
        with self.compute():
            return self.vision(patches, grid_thw=grids).pooler_output

    def _embed(self, ids_BL: Tensor, features: Tensor) -> Tensor:
        """Token embeddings, the video tokens in the places of their placeholders: (B, L, D)."""
        embeds = self.text.embed_tokens(ids_BL)
        places = ids_BL == self.model.config.video_token_id
        if int(places.sum()) != len(features):
            raise ValueError(
                f"{int(places.sum())} video placeholders, but {len(features)} video tokens"
            )
        return embeds.masked_scatter(places[..., None], features.to(embeds.dtype))

    @torch.no_grad()
    def rollout(
        self,
        questions: list[Question],
        features: Tensor,
        num_generations: int,
        max_completion_length: int,
        temperature: float,
        seeds: list[tuple[int, ...]],
        top_p: float = 1.0,
    ) -> list[Group]:
        """G completions of each question, sampled together; `features` from `encode_videos`.

        Question b draws from a random stream of its own, seeds[b], so what else is in the batch
        does not matter.
        """
        B, G, T, device = len(questions), num_generations, max_completion_length, self.device
        uniform_RT = torch.from_numpy(
            np.concatenate([np.random.default_rng(s).random((T, G)).T for s in seeds])
        ).to(device)
        banned_V, eos_ids = self.banned_V.to(device), self.eos_ids.to(device)

        # Prefill: each prompt once, left-padded so that all of them end in the same column.
        P = max(len(q.ids_P) for q in questions)
        ids_BP = torch.stack(
            [F.pad(q.ids_P, (P - len(q.ids_P), 0), value=self.pad_id) for q in questions]
        )
        positions_3BP = torch.stack(
            [F.pad(q.positions_3P, (P - len(q.ids_P), 0)) for q in questions], dim=1
        )
        real_BP = torch.stack([torch.arange(P) >= P - len(q.ids_P) for q in questions]).to(device)
        causal_PP = torch.ones(P, P, dtype=torch.bool, device=device).tril()
        # Padding sees itself: a row that sees nothing would be NaN.
        itself_PP = torch.eye(P, dtype=torch.bool, device=device)
        mask = (causal_PP & real_BP[:, None, :] | itself_PP)[:, None]
        cache = GroupCache(len(self.text.layers), G, T, real_BP)
        with self.compute():
            hidden_BD = self.text(
                inputs_embeds=self._embed(ids_BP.to(device), features),
                position_ids=positions_3BP.to(device),
                attention_mask={"full_attention": mask},
                past_key_values=cache,
            ).last_hidden_state[:, -1]

        # Decode: R = B G rows side by side.
        hidden_RD = hidden_BD.repeat_interleave(G, dim=0)
        following_B = torch.stack([q.positions_3P.max() + 1 for q in questions])
        following_R = following_B.repeat_interleave(G).to(device)
        ended_R = torch.zeros(B * G, dtype=torch.bool, device=device)
        tokens_TR, logps_TR = [], []
        with self.compute(), self._attention("group"):
            for t in range(T):
                tokens_R, logps_R = sample(
                    self.model.lm_head(hidden_RD), temperature, uniform_RT[:, t], banned_V, top_p
                )
                tokens_TR.append(tokens_R)
                logps_TR.append(logps_R)
                ended_R |= torch.isin(tokens_R, eos_ids)
                if t + 1 == T or ended_R.all():
                    break
                cache.t = t
                hidden_RD = self.text(
                    inputs_embeds=self.text.embed_tokens(tokens_R)[:, None],
                    position_ids=(following_R + t).expand(3, -1)[..., None],
                    attention_mask={"full_attention": None},
                    past_key_values=cache,
                    group_cache=cache,
                ).last_hidden_state[:, 0]
        return self._groups(
            questions, torch.stack(tokens_TR, 1).cpu(), torch.stack(logps_TR, 1).cpu(), G
        )

    def _groups(
        self, questions: list[Question], tokens_RT: Tensor, logps_RT: Tensor, G: int
    ) -> list[Group]:
        """Cuts each row after its first end token."""
        is_eos_RT = torch.isin(tokens_RT, self.eos_ids)
        finished_R = is_eos_RT.any(1)
        lengths_R = torch.where(finished_R, is_eos_RT.int().argmax(1) + 1, tokens_RT.shape[1])
        groups = []
        for b, question in enumerate(questions):
            rows = range(b * G, (b + 1) * G)
            groups.append(
                Group(
                    question,
                    [tokens_RT[r, : lengths_R[r]] for r in rows],
                    [bool(finished_R[r]) for r in rows],
                    [self.decode(tokens_RT[r, : lengths_R[r]]) for r in rows],
                    torch.cat([logps_RT[r, : lengths_R[r]] for r in rows]),
                )
            )
        return groups

    def hidden_states(self, groups: list[Group], features: Tensor) -> list[Tensor]:
        """For each question the N hidden states that predict its completion tokens, in their order:
        B x (N, D).

        Every prompt is computed once for its G completions: see `pack`. Equal to G separate
        sequences.
        """
        ids_BL, positions_3BL, segments_BL, rows_N = pack(groups, self.pad_id)
        device = self.device
        with self.compute():
            hidden_BLD = self.text(
                inputs_embeds=self._embed(ids_BL.to(device), features),
                position_ids=positions_3BL.to(device),
                attention_mask={"full_attention": packed_mask(segments_BL.to(device))},
                use_cache=False,
            ).last_hidden_state
        return [hidden_BLD[b, rows.to(device)] for b, rows in enumerate(rows_N)]


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
