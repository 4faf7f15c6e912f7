"""A Qwen-VL model as a policy that encodes each video, prefills each prompt and scores each prompt
only once.

    Policy.encode_videos   patches -> video tokens: one pass of the vision tower for all questions
    Policy.rollout         prompts -> G sampled completions each: prefill once, decode B x G rows
    Policy.hidden_states   completions -> the states that predict them: one packed row per question
    Policy.shard           shards weights, gradients and optimizer state over the ranks (FSDP2)
    Policy.gathered        temporarily gathers the full weights on every rank, for decoding

transformers supplies the network; everything that makes a group cheap is here and in rollout.py.
Position ids come from `video.py` and are always passed explicitly, because the rule inside
transformers has changed between versions.

Shape letters: B questions, G completions of each, P prompt tokens, L tokens of a packed row, N
completion tokens of a question, R = B G rows decoded together, V vocabulary, D hidden size.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data import Question, checkpoint_file, load_chat_template
from files import UserError
from kernels import token_logps
from model import ranks
from model.load import FAMILIES, end_ids, load_model
from model.packing import ATTENTION, Group, pack
from model.rollout import Decoder
from model.tower import tower_layout
from records import Record
from video import Geometry

VISION_TOKENS = [
    f"<|{name}|>" for name in "vision_start vision_end vision_pad image_pad video_pad".split()
]
PROCESSOR_FILES = [  # not used here; copied into saved checkpoints for other programs
    f"{name}_config.json" for name in ("preprocessor", "video_preprocessor", "processor")
]


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Root(nn.Module):
    """The outermost FSDP unit. Inside its forward, the embeddings and the lm_head are gathered
    (once) and can be used whole."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, work: Callable, *args: object) -> object:
        return work(*args)


class Policy:
    """A Qwen-VL model with its tokenizer and the passes that a GRPO step makes through it."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: str
    ):
        self.model, self.tokenizer, self.chat_template = model, tokenizer, chat_template
        self.text, self.vision = model.model.language_model, model.model.visual
        self.root: Root | None = None  # when sharded
        self.save_dtype = torch.float32
        self.text.config._attn_implementation = "packed_rows"
        self.attn_implementation = "sdpa"  # over packed rows: a key of packing.ATTENTION
        config, vision = model.config, model.config.vision_config
        self.geometry = Geometry(
            vision.patch_size,
            vision.temporal_patch_size,
            vision.spatial_merge_size,
            getattr(vision, "tokens_per_second", None),
            **FAMILIES[config.model_type],
        )
        # OFFICIAL: generation stops at <|im_end|> or <|endoftext|>, but the loss mask looks only
        # for the former.  OURS: a completion ends where generation stops.
        self.eos_ids = torch.tensor(end_ids(model, tokenizer))
        self.pad_id = tokenizer.eos_token_id
        # Never sampled: vision ids, which would break the count of video tokens, and ids beyond
        # the tokenizer's that only pad the embedding.
        self.banned_V = torch.arange(config.text_config.vocab_size) >= len(tokenizer)
        self.banned_V[[tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS]] = True

    @classmethod
    def load(
        cls,
        model_name_or_path: str | os.PathLike,
        device: torch.device | str = "cpu",
        freeze_vision_modules: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> "Policy":
        """Loads a checkpoint directory or hub name; on the device "meta", without weights. Raises
        UserError if it is not a Qwen-VL model."""
        name = os.fspath(model_name_or_path)
        model, tokenizer, save_dtype = load_model(name, device, dtype)
        policy = cls(model.eval(), tokenizer, load_chat_template(name, tokenizer))
        policy.save_dtype = save_dtype
        policy.vision.requires_grad_(not freeze_vision_modules)
        return policy

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head_VD(self) -> Tensor:
        return self.model.lm_head.weight

    # ------------------------------------------------------------------------ one rank or several

    def shard(self, device: torch.device) -> None:
        """Shards the parameters over all ranks: one FSDP2 unit per decoder layer and vision block,
        one for the rest. Shards are float32; on CUDA, compute is bf16 and reduction float32."""
        mesh = init_device_mesh(device.type, (ranks.world(),))
        half = torch.bfloat16 if device.type == "cuda" else None
        how = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(half, torch.float32))
        for block in (*self.vision.blocks, *self.text.layers):
            fully_shard(block, **how)
        self.root = Root(self.model)
        fully_shard(self.root, **how)

    def run(self, work: Callable, *args: object) -> object:
        """Returns work(*args), run inside the root's forward if the model is sharded."""
        if self.root is None:
            return work(*args)
        result = self.root(work, *args)
        if not torch.is_grad_enabled():  # FSDP keeps the root gathered, expecting a backward pass
            self.root.reshard()
        return result

    @contextlib.contextmanager
    def gathered(self) -> Iterator["Policy"]:
        """Yields a policy for decoding, with full weights on this rank in the compute dtype: this
        one if it qualifies, or else a copy that is gathered now and freed when the block ends."""
        if self.root is None and self.model.dtype == self.compute_dtype:
            yield self
            return
        actor = self._whole_copy()
        try:
            yield actor
        finally:  # the caller's variable keeps the copy alive, so free its weights here
            for module in actor.model.modules():
                module._parameters.clear()

    def _whole_copy(self) -> "Policy":
        with torch.device("meta"):
            model = type(self.model)(self.model.config).eval()
        for module, copied in zip(self.model.modules(), model.modules(), strict=True):
            copied._buffers.update(module._buffers)
        for name, x in self.model.named_parameters():  # tied weights once
            whole = x.detach().to(self.compute_dtype)
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(whole, requires_grad=False))
        model.tie_weights()  # small models share the lm_head with the embedding
        model.generation_config = self.model.generation_config
        policy = Policy(model, self.tokenizer, self.chat_template)
        policy.eos_ids = self.eos_ids
        return policy

    def save(self, directory: Path, processor_from: str | None = None) -> None:
        """Saves a Hugging Face checkpoint in the model's original dtype, with the processor files
        of `processor_from`. All ranks must call it; the first one writes."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=whole)
        if not ranks.is_main():
            return
        names = dict(self.model.named_parameters())  # tied weights once
        state = {name: state[name].to(self.save_dtype) for name in names}
        self.model.save_pretrained(directory, state_dict=state)
        config = self.model.config  # into which save_pretrained wrote the parameters' dtype
        config.dtype = config.text_config.dtype = config.vision_config.dtype = self.save_dtype
        config.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        template = Path(directory) / "chat_template.jinja"  # the one this policy was trained with
        template.write_text(self.chat_template, encoding="utf-8")
        for name in PROCESSOR_FILES if processor_from else ():
            if file := checkpoint_file(processor_from, name):
                shutil.copyfile(file, Path(directory) / name)

    # ----------------------------------------------------------------------------- the three passes

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.device)

    def compute(self) -> contextlib.AbstractContextManager:
        """bf16 autocast on CUDA, whatever the parameters' dtype; plain float32 elsewhere."""
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")

    def encode_videos(self, questions: list[Question]) -> list[Tensor]:
        """Video tokens of each question, from one pass of the vision tower: B x (tokens, D).

        For Qwen3-VL (tokens, (1 + K) D): each token is followed by its K DeepStack features, which
        are added to it after the first K decoder layers.
        """
        patches = torch.cat([q.patches for q in questions]).to(self.device)
        grids_B3 = torch.tensor([q.grid for q in questions])  # kept on the host, where it is read
        layout = tower_layout(grids_B3, self.vision.config, self.device)
        config = self.vision.config
        before, config._attn_implementation = config._attn_implementation, "segments_flash"
        try:
            with self.compute():
                out = self.vision(patches, grid_thw=grids_B3, **layout)
        finally:
            config._attn_implementation = before  # for transformers' own forward pass
        features = torch.cat([out.pooler_output, *getattr(out, "deepstack_features", ())], dim=-1)
        return list(
            features.split([len(q.patches) // self.geometry.merge_size**2 for q in questions])
        )

    def _embed(self, ids_BL: Tensor, features: list[Tensor]) -> dict[str, Tensor]:
        """Token embeddings with the video tokens in place of their placeholders, as keyword
        arguments of the language model: inputs_embeds (B, L, D), plus any DeepStack features.
        The ids must be on the host: counting placeholders on a GPU would synchronise."""
        embeds = self.text.embed_tokens(ids_BL.to(self.device))
        places = ids_BL == self.model.config.video_token_id
        videos, *deepstack = torch.cat(features).to(embeds.dtype).split(embeds.shape[-1], dim=-1)
        if int(places.sum()) != len(videos):
            raise ValueError(f"{int(places.sum())} video placeholders, {len(videos)} video tokens")
        places = places.to(self.device)
        inputs = dict(inputs_embeds=embeds.masked_scatter(places[..., None], videos))
        if deepstack:
            inputs |= dict(visual_pos_masks=places, deepstack_visual_embeds=deepstack)
        return inputs

    @torch.no_grad()
    def rollout(
        self,
        questions: list[Question],
        features: list[Tensor],
        num_generations: int,
        max_completion_length: int,
        temperature: float,
        seeds: list[tuple[int, ...]],
        top_p: float = 1.0,
    ) -> list[Group]:
        """Samples G completions per question, all together; `features` are from `encode_videos`.

        Question b has its own random stream, seeds[b], so its completions do not depend on the
        rest of the batch.
        """
        shape = max_completion_length, num_generations
        uniform_RT = torch.from_numpy(
            np.concatenate([np.random.default_rng(seed).random(shape).T for seed in seeds])
        )
        # Prefill each prompt once, with right padding, which causal attention never sees.
        ids_BP, positions_3BP, *_ = pack([Group(q) for q in questions], self.pad_id)
        self.text.eval()
        with self.compute():
            prefill = self.text(
                **self._embed(ids_BP, features),
                position_ids=positions_3BP.to(self.device),
                use_cache=True,
            )
            decoder = Decoder(self, questions, prefill, uniform_RT, temperature, top_p)
            tokens_RT, logps_RT = decoder.run()
        return self._groups(questions, tokens_RT.cpu(), logps_RT.cpu())

    def _groups(
        self, questions: list[Question], tokens_RT: Tensor, logps_RT: Tensor
    ) -> list[Group]:
        """Eq. 6: truncates each row after its first end token. Raises UserError naming the
        questions with non-finite log-probs."""
        ends_RT = torch.isin(tokens_RT, self.eos_ids)
        is_kept_RT = ends_RT.cumsum(1) - ends_RT.int() == 0  # no end token before it
        completions = [row[kept] for row, kept in zip(tokens_RT, is_kept_RT, strict=True)]
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        finished, G, groups = ends_RT.any(1).tolist(), len(tokens_RT) // len(questions), []
        for b, question in enumerate(questions):
            rows = slice(b * G, (b + 1) * G)
            logps_N = logps_RT[rows][is_kept_RT[rows]]
            groups.append(Group(question, completions[rows], finished[rows], texts[rows], logps_N))
        bad = [g.question.record.id for g in groups if not g.sampled_logps_N.isfinite().all()]
        if bad:
            raise UserError(
                f"the model's logits were not finite on question(s) {', '.join(bad)}; its weights, "
                "or the arithmetic on this machine, are broken"
            )
        return groups

    def hidden_states(self, groups: list[Group]) -> list[Tensor]:
        """For each question, the N hidden states that predict its completion tokens: B x (N, D).

        Each prompt is computed once for its G completions (see `pack`), with the same result as G
        separate sequences. Videos that have no features from the rollout are encoded, with gradient
        if the vision tower is trained.
        """
        features = [group.features for group in groups]
        if features[0] is None:
            features = self.encode_videos([group.question for group in groups])
        ids_BL, positions_3BL, sizes, rows_N = pack(groups, self.pad_id)
        self.text.train(self.text.is_gradient_checkpointing)  # it checkpoints in training only
        with self.compute():
            hidden_BLD = self.text(
                **self._embed(ids_BL, features),
                position_ids=positions_3BL.to(self.device),
                packed=sizes,
                attend=ATTENTION[self.attn_implementation],
                use_cache=False,
            ).last_hidden_state
        return [hidden_BLD[b, rows.to(self.device)] for b, rows in enumerate(rows_N)]

    @torch.no_grad()
    def completion_logps(self, groups: list[Group], temperature: float) -> list[Tensor]:
        """Eq. 8: the log-prob of each completion token, B x (N,)."""
        dtype, device = self.compute_dtype, self.device
        return [
            token_logps(h.to(dtype), self.head_VD.to(dtype), g.targets_N.to(device), temperature)
            for g, h in zip(groups, self.hidden_states(groups), strict=True)
        ]

    def checkpoint_activations(self) -> None:
        """Stores only each decoder layer's input; the backward pass recomputes the rest."""
        self.text.gradient_checkpointing_enable({"use_reentrant": False})

    def idle_group(self) -> Group:
        """A blank video of one token and one completion of two. A rank left without a question
        scores it to take part in the collectives of the other ranks. Its advantage is 0, and so is
        its gradient."""
        geometry, m = self.geometry, self.geometry.merge_size
        patches = torch.zeros(m * m, 3 * geometry.temporal_patch_size * geometry.patch_size**2)
        ids_P = torch.tensor([self.model.config.video_token_id])
        positions_3P, record = torch.zeros(3, 1, dtype=torch.long), Record("idle", "", "", Path())
        question = Question(record, "", ids_P, positions_3P, patches, (1, m, m), seconds=1.0)
        completion = torch.full((2,), self.pad_id)
        return Group(question, [completion], [True], [""], advantages_G=torch.zeros(1))
