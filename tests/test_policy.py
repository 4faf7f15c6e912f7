"""The policy's three passes against transformers' own model, given one padded row per completion.

What transformers computes here is its full forward pass with our position ids: token embeddings,
video features in place, causal attention over the sequence, logits. Packing, the prefilled cache
and padding must change nothing.
"""

import math
import re
import types
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import questions_of, random_completions
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForImageTextToText

import eval as evaluation
import toy
from benchmarks import step
from data import Prompter
from files import UserError
from model.packing import Group
from model.policy import Policy, Root
from model.rollout import Decoder, sample
from video import ClipSettings

LENGTHS = [[5, 1, 9, 3], [2, 2, 2, 7], [1, 1, 1, 1]]


def groups_of(policy, questions, lengths=LENGTHS):
    return [
        Group(question, random_completions(policy, ls, seed))
        for seed, (question, ls) in enumerate(zip(questions, lengths, strict=True))
    ]


def rollout(policy, questions, G=3, T=12, temperature=1.0, seeds=(0, 1, 2)):
    features = policy.encode_videos(questions)
    return policy.rollout(questions, features, G, T, temperature, [(b,) for b in seeds])


def logps_of(logits_NV, group) -> torch.Tensor:
    return logits_NV.log_softmax(-1).gather(1, group.targets_N[:, None])[:, 0]


def separate_logits(policy, group) -> torch.Tensor:
    """Transformers' logits, each completion in a sequence of its own: (N, V)."""
    question, rows = group.question, []
    P = len(question.ids_P)
    for completion in group.completions:
        after = question.positions_3P.max() + 1 + torch.arange(len(completion)).expand(3, -1)
        logits = policy.model(
            input_ids=torch.cat([question.ids_P, completion])[None],
            position_ids=torch.cat([question.positions_3P, after], dim=1)[:, None],
            pixel_values_videos=question.patches,
            video_grid_thw=torch.tensor([question.grid]),
        ).logits[0]
        rows.append(logits[P - 1 : -1])
    return torch.cat(rows)


def gradients(policy, *outputs) -> dict[str, torch.Tensor]:
    """By parameter: the gradient of a fixed random combination of the outputs."""
    policy.model.zero_grad()
    probes = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for x in outputs]
    sum((x * probe.to(x.device)).sum() for x, probe in zip(outputs, probes, strict=True)).backward()
    return {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}


def distance(ours: dict, theirs: dict) -> float:
    """The largest norm of a difference, relative to the norm of theirs."""
    assert ours.keys() == theirs.keys() and len(ours) > 15
    pairs = ((ours[name].cpu(), exact) for name, exact in theirs.items())
    return max(((x - exact).norm() / exact.norm().clamp_min(1e-12)).item() for x, exact in pairs)


VISION = dict(  # towers of toy size; that of Qwen2.5-VL is the toy's own
    qwen2_5_vl={},
    qwen2_vl=dict(depth=1, embed_dim=64, hidden_size=96, num_heads=4, mlp_ratio=2),
    qwen3_vl=dict(depth=3, hidden_size=64, num_heads=4, intermediate_size=128, out_hidden_size=96)
    | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1], initializer_range=0.1),
)


def as_family(kind: str, policy: Policy, tie: bool = False) -> Policy:
    """A model of that kind, of toy size, with the same tokenizer. Qwen2-VL has no absolute time,
    Qwen3-VL two DeepStack layers and heads of 32. With `tie`, the lm_head is the embedding."""
    config = policy.model.config.to_dict()
    text = dict(config["text_config"], model_type=f"{kind}_text", tie_word_embeddings=tie)
    if kind == "qwen3_vl":
        rope = dict(text["rope_parameters"], mrope_section=[6, 5, 5], mrope_interleaved=True)
        text |= dict(
            head_dim=32,
            num_hidden_layers=3,
            rope_parameters=rope,
            layer_types=["full_attention"] * 3,
        )
    config = AutoConfig.for_model(
        kind,
        text_config=text,
        vision_config=VISION[kind] or config["vision_config"],
        tie_word_embeddings=tie,
        **{name: value for name, value in config.items() if name.endswith("_token_id")},
    )
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.generation_config = policy.model.generation_config
    return Policy(model, policy.tokenizer, policy.chat_template)


def prompter_for(policy: Policy) -> Prompter:
    """Shows 4 frames of 2 x 2 video tokens."""
    pixels = (2 * policy.geometry.factor) ** 2
    clips = ClipSettings(max_frames=4, min_pixels=pixels, max_pixels=pixels)
    return Prompter(policy.tokenizer, policy.chat_template, policy.geometry, clips=clips)


@pytest.fixture(params=VISION)
def family(request, policy, records):
    """A policy of each kind, and three questions whose prompts differ in length."""
    policy = as_family(request.param, policy)
    return policy, questions_of(prompter_for(policy), records)


def test_packed_scoring_equals_separate_sequences(family):
    """Logits within 1e-5, gradients within 1e-4: three questions of different length at once."""
    policy, questions = family
    groups = groups_of(policy, questions)
    packed = [policy.model.lm_head(hidden_ND) for hidden_ND in policy.hidden_states(groups)]
    separate = [separate_logits(policy, group) for group in groups]
    for ours, theirs in zip(packed, separate, strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    ours, theirs = gradients(policy, *packed), gradients(policy, *separate)
    assert distance(ours, theirs) < 1e-4
    bias = "model.visual.deepstack_merger_list.1.norm.bias"
    assert (bias in ours) == (policy.model.config.model_type == "qwen3_vl")


@torch.no_grad()
def test_rollout_logps_equal_a_full_forward(family):
    """What decoding recorded at every step, against transformers' logits of the sequence."""
    for group in rollout(*family):
        logps_N = logps_of(separate_logits(family[0], group), group)
        assert len(group.completions) == 3
        assert (group.sampled_logps_N - logps_N).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_positions_and_greedy_rollout_equal_those_of_transformers(kind, policy, records):
    """Token for token, though its generate works out the positions itself. (For Qwen2.5-VL its rule
    changes from version to version.)"""
    policy = as_family(kind, policy)
    policy.eos_ids = torch.tensor([-1])
    questions = questions_of(prompter_for(policy), records)
    groups = rollout(policy, questions, G=1, temperature=0.0)
    for question, group in zip(questions, groups, strict=True):
        ids = question.ids_P[None]
        shown = dict(
            mm_token_type_ids=2 * (ids == policy.model.config.video_token_id).int(),
            video_grid_thw=torch.tensor([question.grid]),
        )
        positions_31P, _ = policy.model.model.get_rope_index(ids, **shown)
        assert torch.equal(question.positions_3P, positions_31P[:, 0])
        theirs = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=question.patches,
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=-1,
            suppress_tokens=policy.banned_V.nonzero()[:, 0].tolist(),
            **shown,
        )
        assert group.completions[0].tolist() == theirs[0, len(question.ids_P) :].tolist()


@torch.no_grad()
def test_a_float32_policy_decodes_under_autocast(policy, questions, monkeypatch):
    """As on a GPU: keys are float32 once they are rotated, values bf16. The scoring agrees."""
    monkeypatch.setattr(policy, "compute", lambda: torch.autocast("cpu", torch.bfloat16))
    groups = rollout(policy, questions)
    for group, hidden_ND in zip(groups, policy.hidden_states(groups), strict=True):
        scored_N = logps_of(policy.model.lm_head(hidden_ND.float()), group)
        assert (group.sampled_logps_N - scored_N).abs().max() < 0.1


def test_rollout_does_not_depend_on_what_else_is_in_the_batch(policy, questions):
    def completions(*chosen):
        groups = rollout(policy, [questions[b] for b in chosen], G=4, T=10, seeds=chosen)
        return [[c.tolist() for c in g.completions] for g in groups]

    together = completions(0, 1, 2)
    assert completions(2) == together[2:]
    assert completions(1, 0) == [together[1], together[0]]
    assert together[0] != together[1] and len({tuple(c) for c in together[0]}) > 1


def test_completions_end_with_their_first_end_token(policy, questions):
    policy.eos_ids = (~policy.banned_V).nonzero()[::7, 0]  # so many that rows end everywhere
    groups, ends = rollout(policy, questions, G=4), set(policy.eos_ids.tolist())
    for group in groups:
        assert len(group.sampled_logps_N) == int(group.lengths_G.sum()) == len(group.targets_N)
        for completion, finished in zip(group.completions, group.finished, strict=True):
            assert (completion[-1].item() in ends) == finished
            assert not ends & set(completion[:-1].tolist())
            assert finished or len(completion) == 12
    assert len({len(c) for g in groups for c in g.completions}) > 2


def test_vision_ids_and_words_beyond_the_tokenizer_are_never_sampled(policy):
    names = "vision_start vision_end vision_pad image_pad video_pad".split()
    banned = policy.tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    assert policy.banned_V.nonzero()[:, 0].tolist() == sorted(banned)
    logits = torch.zeros(2000, len(policy.banned_V))
    logits[:, banned] = 9.0
    uniform = torch.from_numpy(np.random.default_rng(0).random(2000))
    for temperature in (0.0, 1.0):
        tokens, _ = sample(logits, temperature, uniform, policy.banned_V)
        assert not policy.banned_V[tokens].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_draw_the_tokens_of_eager_ones(policy, questions, monkeypatch):
    policy.eos_ids = torch.tensor([-1])  # never end
    policy.model.cuda()
    with torch.no_grad(), policy.gathered() as actor:
        captured = rollout(actor, questions, G=4, T=84)
        monkeypatch.setattr(Decoder, "_captured_step", lambda decoder: decoder.step)
        eager = rollout(actor, questions, G=4, T=84)
    for a, b in zip(captured, eager, strict=True):
        assert all(map(torch.equal, a.completions, b.completions))
        assert (a.sampled_logps_N - b.sampled_logps_N).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_whole_softmax(temperature):
    """100,000 draws against the probabilities: no hidden top-k, the temperature applied once."""
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(0)) * 2
    draws = 100_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(draws))
    tokens, logps = sample(
        logits.expand(draws, -1), temperature, uniform, torch.zeros(60, dtype=torch.bool)
    )
    expected = (logits[0].double() / temperature).softmax(0)
    counts = torch.bincount(tokens, minlength=60).double()
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected)).sum()
    assert chi_square < 59 + 5 * (2 * 59) ** 0.5
    assert torch.allclose(logps.double(), expected.log()[tokens], atol=1e-5)


@pytest.mark.parametrize("kind, calls", [("qwen2_5_vl", 4 + 4 + 2), ("qwen2_vl", 2)])
def test_the_vision_tower_attends_in_batches(kind, calls, policy, monkeypatch):
    """Clips of two sizes, their windows cut off at the borders, in two windowed layers and a full
    one: the tower of transformers, which calls attention once per window, and its gradients."""
    model = toy.build_model(policy.tokenizer, vision=dict(depth=3))
    policy = as_family(kind, Policy(model, policy.tokenizer, policy.chat_template))
    sizes = [(2, 22, 34), (1, 6, 10), (3, 22, 34)]
    clips = [types.SimpleNamespace(grid=s, patches=torch.randn(math.prod(s), 1176)) for s in sizes]
    patches, grids = torch.cat([clip.patches for clip in clips]), torch.tensor(sizes)
    with mock.patch.object(
        F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention
    ) as attend:
        ours = torch.cat(policy.encode_videos(clips))
        assert attend.call_count == calls  # four lengths of windows, two of frames
        theirs = policy.vision(patches, grid_thw=grids).pooler_output
        assert attend.call_count >= 3 * calls
    assert (ours - theirs).abs().max() < 1e-5
    assert distance(gradients(policy, ours), gradients(policy, theirs)) < 1e-5


def test_on_cuda_an_evaluation_holds_its_weights_once(world, policy, monkeypatch):
    """In bf16 from the start, so that 7B fits 24 GB; training's float32 weights need a copy."""
    for module in ("eval", "model.policy"):
        monkeypatch.setattr(f"{module}.compute_dtype", lambda device: torch.bfloat16)
    seen = []
    monkeypatch.setattr(evaluation, "answer", lambda cfg, policy, *_: seen.append(policy) or [])
    with policy.gathered() as copy:
        assert copy is not policy
        monkeypatch.delattr(Policy, "_whole_copy")
        args = evaluation.parser().parse_args(
            f"ask --model {world}/model --video v --question q".split()
        )
        assert not list(evaluation.answers(args, evaluation.config(args), [], []))
        (loaded,) = seen
        for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
            ours, theirs = (dict(tensors(one.model)) for one in (loaded, copy))
            assert_close(ours, theirs, rtol=0, atol=0)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_a_gathered_copy_is_the_same_model_and_leaves_no_trace(policy, questions, tmp_path):
    """It is made on every GPU and every rank of several; here by claiming to be sharded."""
    groups = groups_of(policy, questions)
    with torch.no_grad():
        before = policy.hidden_states(groups)
        texts = [group.texts for group in rollout(policy, questions)]
        policy.root = Root(policy.model)
        with policy.gathered() as actor:
            assert actor.model is not policy.model
            assert all(map(torch.equal, actor.hidden_states(groups), before))
            assert [group.texts for group in rollout(actor, questions)] == texts
        assert all(map(torch.equal, policy.hidden_states(groups), before))
    policy.save(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()


def test_frozen_vision_gets_no_gradient(world, questions):
    policy = Policy.load(world / "model", freeze_vision_modules=True)
    groups = groups_of(policy, questions)
    sum(hidden_ND.sum() for hidden_ND in policy.hidden_states(groups)).backward()
    assert not any(p.requires_grad or p.grad is not None for p in policy.vision.parameters())
    assert all(p.grad is not None for p in policy.text.parameters())


def test_processor_chat_template_comes_before_the_tokenizers(policy, tmp_path):
    policy.save(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "from the processor"}')
    assert Policy.load(tmp_path).chat_template == "from the processor"


@pytest.mark.parametrize(
    "name, old, new, reason",
    [
        ("config.json", "(?s)^.+$", "{}", "not a checkpoint; it has no config.json"),
        ("config.json", "(?s)^.+$", "{", "not a checkpoint for transformers ("),
        ("config.json", "qwen2_5_vl", "qwen2", "is a 'qwen2' model"),
        ("config.json", "full_attention", "sliding_attention", "has sliding-window layers"),
        ("config.json", "(?<=video_token_id).: [0-9]+", '": 7', "does not have <|video_pad|>"),
        ("tokenizer.json", "(?s)^.+$", "{", "its weights or tokenizer cannot be loaded"),
        (
            "model.safetensors",
            "lm_head.weight",
            "lm_head.weighs",
            "lack 1 tensors, such as lm_head",
        ),
    ],
)
def test_a_checkpoint_that_cannot_train_is_refused(name, old, new, reason, policy, tmp_path):
    with pytest.raises(UserError, match="none: no such model directory"):
        Policy.load(tmp_path / "none")
    policy.save(tmp_path)
    file = tmp_path / name
    file.write_bytes(re.sub(old.encode(), new.encode(), file.read_bytes()))
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}: .*{re.escape(reason)}"):
        Policy.load(tmp_path)


@pytest.mark.slow
def test_a_step_is_twice_as_fast_as_the_official_way(capsys):
    """30 M parameters, a prompt of about 600 tokens, G = 8 completions of 32: about four times as
    fast on a quiet machine. The official way is generate(num_return_sequences=8), then eight padded
    copies."""
    ours, official = (
        step.measure(way, "tiny", 600, repeats=1, max_completion_length=32)["step_s"]
        for way in ("ours", "official")
    )
    with capsys.disabled():
        print(f"\na step: ours {ours:.2f} s, official {official:.2f} s: {official / ours:.1f}x")
    assert official > 2 * ours
