"""Qwen3-VL through the same passes: prompts, positions, DeepStack, rollout and scoring, against
transformers' own model and processor."""

import numpy as np
import pytest
import torch
from conftest import questions_of
from test_policy import gradients, groups_of, relative, separate_logits
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import toy
from data import Prompter
from model.policy import Policy


def as_qwen3_vl(policy: Policy, tie: bool = False) -> Policy:
    """A Qwen3-VL of toy size with the same tokenizer: two DeepStack layers, heads of 32."""
    ours = policy.model.config
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5], mrope_interleaved=True)
    text = dict(
        vocab_size=ours.text_config.vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.05,
        rope_parameters=rope,
        tie_word_embeddings=tie,
    )
    vision = dict(
        depth=3,
        hidden_size=64,
        num_heads=4,
        intermediate_size=128,
        out_hidden_size=96,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
        initializer_range=0.1,
    )
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tie,
        **{name: getattr(ours, name) for name in ids},
    )
    torch.manual_seed(2)
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.generation_config = policy.model.generation_config
    return Policy(model, policy.tokenizer, policy.chat_template)


@pytest.fixture
def qwen3(policy):
    return as_qwen3_vl(policy)


@pytest.fixture
def prompter(qwen3):
    clip = dict(max_frames=4, min_pixels=64 * 64, max_pixels=64 * 64)
    return Prompter(qwen3.tokenizer, qwen3.chat_template, qwen3.geometry, **clip)


@pytest.fixture
def questions(prompter, records):
    return questions_of(prompter, records)


def test_packed_scoring_equals_separate_sequences(qwen3, questions):
    groups = groups_of(qwen3, questions)
    hidden = qwen3.hidden_states(groups, qwen3.encode_videos(questions))
    packed = [qwen3.model.lm_head(h) for h in hidden]
    separate = [torch.cat(separate_logits(qwen3, group)) for group in groups]
    for ours, theirs in zip(packed, separate, strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    probe = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for x in packed]
    sum((x * p).sum() for x, p in zip(packed, probe, strict=True)).backward()
    ours = gradients(qwen3)
    qwen3.model.zero_grad()
    sum((x * p).sum() for x, p in zip(separate, probe, strict=True)).backward()
    theirs = gradients(qwen3)
    assert ours.keys() == theirs.keys() and "model.visual.deepstack_merger_list.1.norm.bias" in ours
    assert max(relative(ours[name], theirs[name]) for name in ours) < 1e-4


def test_rollout_logps_equal_a_full_forward(qwen3, questions):
    features = qwen3.encode_videos(questions)
    groups = qwen3.rollout(questions, features, 3, 12, 1.0, [(0, b) for b in range(3)])
    for group in groups:
        logps = [
            rows.log_softmax(-1).gather(1, c[:, None])[:, 0]
            for rows, c in zip(separate_logits(qwen3, group), group.completions, strict=True)
        ]
        assert (group.sampled_logps_N - torch.cat(logps)).abs().max() < 1e-5


def test_positions_equal_transformers(qwen3, questions):
    for question in questions:
        is_video = (question.ids_P == qwen3.model.config.video_token_id).int()
        theirs, _ = qwen3.model.model.get_rope_index(
            question.ids_P[None],
            mm_token_type_ids=2 * is_video[None],
            video_grid_thw=torch.tensor([question.grid]),
        )
        assert torch.equal(question.positions_3P, theirs[:, 0])
