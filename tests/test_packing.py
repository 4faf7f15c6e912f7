"""Packed rows and the three ways to attend over them.

flash-attn needs a GPU, so on a CPU its variable-length call is a stand-in that does what its
documentation says: sequence by sequence, the last query at the last key. What is tested is which
tokens we hand it. torch's FlexAttention has no backward pass on a CPU; there only forward.
"""

import dataclasses
import json
import shutil
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import random_completions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from files import UserError
from model.packing import (
    ATTENTION,
    Group,
    compiled,
    pack,
    packed_blocks,
    packed_mask,
    packed_rule,
    packed_sequences,
)
from model.policy import Root
from run.config import Config, check_attention

LENGTHS = ([5, 1, 9], [3, 3, 2], [1, 1, 7])


@pytest.fixture
def groups(policy, questions):
    return [
        Group(question, random_completions(policy, lengths, seed=k), [True] * 3, [""] * 3)
        for k, (question, lengths) in enumerate(zip(questions, LENGTHS, strict=True))
    ]


def varlen_by_the_book(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal):
    """flash_attn_varlen_func, restated: q (tokens, H, d), k and v with fewer heads."""
    assert causal and cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
    out = []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        n, m = q1 - q0, k1 - k0
        sees = torch.arange(m) <= torch.arange(n)[:, None] + (m - n)
        shared = q.shape[1] // k.shape[1]
        heads = [x[k0:k1].repeat_interleave(shared, 1).transpose(0, 1) for x in (k, v)]
        out.append(
            F.scaled_dot_product_attention(
                q[q0:q1].transpose(0, 1), *heads, attn_mask=sees, scale=softmax_scale
            ).transpose(0, 1)
        )
    return torch.cat(out)


@pytest.fixture
def flash_attn(monkeypatch):
    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func = varlen_by_the_book
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)


def score(policy, groups, attention: str):
    """Hidden states of all completions, and the gradient of a fixed function of them."""
    policy.attend_with(attention)
    policy.model.zero_grad()
    hidden = torch.cat(policy.hidden_states(groups, features_of(policy, groups)))
    probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    (hidden * probe.to(hidden.device)).sum().backward()
    return hidden.detach(), {
        name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None
    }


def features_of(policy, groups):
    with torch.no_grad():
        return policy.encode_videos([group.question for group in groups])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_variable_length_sequences_equal_the_mask(policy, groups, flash_attn, checkpointed):
    if checkpointed:  # its second forward pass comes late, and must attend in the same way
        policy.checkpoint_activations()
    hidden, gradients = score(policy, groups, "sdpa")
    ours, our_gradients = score(policy, groups, "flash_attention_2")
    assert (ours - hidden).abs().max() < 1e-5
    assert our_gradients.keys() == gradients.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_flex_attention_equals_the_mask(policy, groups):
    with torch.no_grad():
        features = features_of(policy, groups)
        masked = policy.hidden_states(groups, features)
        policy.attend_with("flex_attention")
        blocked = policy.hidden_states(groups, features)
    assert max((a - b).abs().max() for a, b in zip(masked, blocked, strict=True)) < 1e-5


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_gathered_copy_attends_as_its_policy_does(policy, groups, flash_attn, attention):
    """The copy is made on every GPU and every rank of several; here by claiming to be sharded."""
    policy.attend_with(attention)
    with torch.no_grad():
        features = features_of(policy, groups)
        before = policy.hidden_states(groups, features)
        policy.root = Root(policy.model)
        with policy.gathered() as actor:
            assert actor.model is not policy.model
            inside = actor.hidden_states(groups, features)
            questions, seeds = [groups[0].question], [(1,)]
            assert actor.rollout(questions, features[:1], 2, 4, 1.0, seeds)
        after = policy.hidden_states(groups, features)
    for a, b, c in zip(before, inside, after, strict=True):
        assert torch.equal(a, c) and (a - b).abs().max() < 1e-6


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_flex_attention_is_compiled_once_for_long_rows():
    """Every step has another length; compiling anew each time would cost more than the step."""
    torch._dynamo.reset()
    compiled.cache_clear()
    counters = torch._dynamo.utils.counters["stats"]
    before, attend = counters["unique_graphs"], compiled(flex_attention)
    for L in (300, 222, 411, 512):
        segments_1L = torch.arange(L)[None] * 4 // L  # a prompt and three completions
        query, key, value = (torch.randn(1, heads, L, 32) for heads in (4, 2, 2))
        out = attend(query, key, value, block_mask=packed_blocks(segments_1L), enable_gqa=True)
        exact = F.scaled_dot_product_attention(
            query, key, value, attn_mask=packed_mask(segments_1L), enable_gqa=True
        )
        assert (out - exact).abs().max() < 1e-5
    assert counters["unique_graphs"] == before + 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_block_masks_are_compiled_once_for_long_rows():
    torch._dynamo.reset()
    compiled.cache_clear()
    counters, graphs = torch._dynamo.utils.counters["stats"], []
    for L in (300, 222, 411, 512):
        segments_1L = torch.arange(L)[None] * 4 // L
        mask = compiled(create_block_mask)(packed_rule(segments_1L), 1, None, L, L, device="cpu")
        assert torch.equal(mask.to_dense(), packed_blocks(segments_1L).to_dense())
        graphs.append(counters["unique_graphs"])
    assert graphs[1:] == graphs[:1] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_on_a_gpu_equals_the_mask(policy, groups, attention):
    """In bf16: as far from float32 as sdpa in bf16 is, and some."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    exact, _ = score(policy, groups, "sdpa")
    policy.model.cuda()
    masked, gradients = score(policy, groups, "sdpa")
    ours, our_gradients = score(policy, groups, attention)
    error = (masked.cpu() - exact).norm()
    assert (ours.cpu() - exact).norm() <= 1.5 * error + 1e-3 * exact.norm()
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 0.05 * gradient.norm(), name


rows = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(0, 4), min_size=1, max_size=4)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=100, deadline=None)
@given(rows)
def test_the_three_forms_are_one_rule(shapes):
    """Prompts and completions of any length, some empty: each form says who sees whom alike."""
    segments = [
        torch.tensor([0] * prompt + [i for i, n in enumerate(lengths, 1) for _ in range(n)])
        for prompt, lengths in shapes
    ]
    L = max(map(len, segments))
    segments_BL = torch.stack([F.pad(s, (0, L - len(s)), value=-1) for s in segments])
    mask_BLL = packed_mask(segments_BL)[:, 0]

    blocks = packed_blocks(segments_BL)
    dense = create_mask(blocks.mask_mod, len(segments), 1, L, L, device="cpu")[:, 0]
    assert torch.equal(dense, mask_BLL)

    packed = packed_sequences(segments_BL)
    seen = torch.zeros(len(segments) * L, L, dtype=torch.bool)
    q, k = packed.query_starts.tolist(), packed.key_starts.tolist()
    for q0, q1, k0, k1 in zip(q[:-1], q[1:], k[:-1], k[1:], strict=True):
        for n, query in enumerate(packed.query_Q[q0:q1]):
            seen[query, packed.key_K[k0 : k1 - (q1 - q0) + n + 1] % L] = True
    padding_BL = segments_BL == -1
    assert torch.equal(seen.view_as(mask_BLL), mask_BLL & ~padding_BL[..., None])


def test_rollout_and_checkpoint_do_not_depend_on_it(policy, questions, flash_attn, tmp_path):
    features, seeds = features_of(policy, [Group(questions[0], [], [], [])]), [(1,)]
    before = policy.rollout(questions[:1], features, 3, 8, 1.0, seeds)
    policy.attend_with("flash_attention_2")
    after = policy.rollout(questions[:1], features, 3, 8, 1.0, seeds)
    assert before[0].texts == after[0].texts
    policy.save(tmp_path)
    assert "packed_varlen" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_attention_that_cannot_train_here_is_refused(flash_attn, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for device in (cpu, cuda):
        check_attention(Config(), device)
    flex, flash = (Config(attn_implementation=n) for n in ("flex_attention", "flash_attention_2"))
    for cfg in (flex, flash):
        check_attention(cfg, cuda)
        with pytest.raises(UserError, match="sdpa works everywhere"):
            check_attention(cfg, cpu)
        check_attention(dataclasses.replace(cfg, dry_run=True), cpu)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UserError, match="pip install flash-attn"):
        check_attention(flash, cuda)


def test_pack_by_hand(questions):
    """Completions of 3 tokens and of 1: the row is the prompt and two tokens of the first."""
    question = questions[0]
    P, after = len(question.ids_P), int(question.positions_3P.max()) + 1
    group = Group(question, [torch.tensor([7, 8, 9]), torch.tensor([6])], [True] * 2, [""] * 2)
    ids, positions, segments, rows = pack([group], pad_id=0)
    assert ids[0].tolist() == [*question.ids_P.tolist(), 7, 8]
    assert segments[0].tolist() == [0] * P + [1, 1]
    assert positions[:, 0, P:].tolist() == [[after, after + 1]] * 3
    assert rows[0].tolist() == [P - 1, P, P + 1, P - 1]


def test_packed_mask_by_hand():
    mask = packed_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],  # c_1 sees the prompt and itself
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],  # c_2 sees the prompt, not c_1
        [1, 1, 0, 0, 0, 1],  # padding is seen by nobody else
    ]
