"""Packed rows and the attention over them, against torch's attention with a dense mask.

flash-attn needs a GPU, so on a CPU a stand-in does what its documentation says.
"""

import sys
import types
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_policy import distance, gradients, groups_of
from torch.nn.utils.rnn import pad_sequence

from files import UserError
from model.packing import ATTENTION, Group, pack, packed_attention
from run.config import Config, check_attention


@pytest.fixture
def groups(policy, questions):
    return groups_of(policy, questions, [[5, 1, 9], [3, 3, 2], [1, 1, 7]])


def by_the_book(q_BTHd, k_BMKd, v_BMKd, softmax_scale, causal):
    """flash_attn_func since version 2.1: causal, with the last query at the last key."""
    (B, T, H, d), (_, M, K, _) = q_BTHd.shape, k_BMKd.shape
    assert causal and T <= M and H % K == 0 and k_BMKd.shape == v_BMKd.shape == (B, M, K, d)
    assert q_BTHd.dtype == k_BMKd.dtype == v_BMKd.dtype
    sees = torch.ones(T, M, dtype=torch.bool).tril(M - T)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BMKd, v_BMKd))
    how = dict(attn_mask=sees, scale=softmax_scale, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)


FLASH_ATTN = types.SimpleNamespace(flash_attn_func=by_the_book)


@pytest.fixture
def flash_attn(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", FLASH_ATTN)


def score(policy, groups, attention: str) -> dict[str, torch.Tensor]:
    """Hidden states of all completions, and the gradients of a fixed function of them."""
    policy.attn_implementation = attention
    hidden = torch.cat(policy.hidden_states(groups))
    return gradients(policy, hidden) | dict(hidden=hidden.detach())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_policy_scores_alike_in_both_ways(policy, groups, flash_attn, checkpointed):
    if checkpointed:  # its second forward pass comes late, and must attend in the same way
        policy.checkpoint_activations()
    exact = score(policy, groups, "sdpa")
    ours = score(policy, groups, "flash_attention_2")
    assert (ours["hidden"] - exact["hidden"]).abs().max() < 1e-5 and distance(ours, exact) < 1e-4


ROW = st.tuples(st.integers(1, 6), st.lists(st.integers(0, 4), min_size=1, max_size=4))


@given(
    st.lists(ROW, min_size=1, max_size=4),
    st.sampled_from([(2, 1), (2, 3), (1, 1)]),
    st.sampled_from([1, 2]),
    st.sampled_from(list(ATTENTION.values())),
)
def test_both_ways_equal_a_dense_mask(shapes, heads, scale, attend):
    """Prompts and completions of any length, some empty, with shared key heads: outputs within
    1e-5, gradients within 1e-4."""
    segments = [
        torch.tensor([0] * prompt + [i for i, n in enumerate(lengths, 1) for _ in range(n)])
        for prompt, lengths in shapes
    ]
    segments_BL = pad_sequence(segments, batch_first=True, padding_value=-1)
    (B, L), (key_heads, shared), d = segments_BL.shape, heads, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(B, h, L, d, generator=generator, requires_grad=True)
        for h in (key_heads * shared, key_heads, key_heads)
    )
    with mock.patch.dict(sys.modules, flash_attn=FLASH_ATTN):
        sizes = [[prompt, *filter(None, lengths)] for prompt, lengths in shapes]
        ours, _ = packed_attention(None, q, k, v, None, scaling=scale, packed=sizes, attend=attend)
    asker, seen = segments_BL[:, None, :, None], segments_BL[:, None, None]
    mask = ((seen == 0) | (seen == asker)) & torch.ones(L, L, dtype=torch.bool).tril()
    theirs = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    is_token = segments_BL >= 0  # what padding gets does not matter
    ours, theirs = ours[is_token], theirs.transpose(1, 2)[is_token]
    assert (ours - theirs).abs().max() < 1e-5
    probe = torch.randn(ours.shape, generator=generator)
    gradients = (torch.autograd.grad((x * probe).sum(), (q, k, v)) for x in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=0.1)


def test_scoring_keeps_nothing_quadratic():
    """No tensor that attention saves for its backward pass has L x L elements."""
    sizes, L = [], 1200
    q = torch.randn(1, 1, L, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
        packed_attention(None, q, q, q, None, scaling=1.0, packed=[[200] + [100] * 10])
    assert max(sizes) < 10 * q.numel() < L * L


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ATTENTION)
def test_attention_on_a_gpu_equals_that_of_a_cpu(policy, groups, attention):
    """In bf16, against float32 on the CPU."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    exact = score(policy, groups, "sdpa")
    policy.model.cuda()
    ours = score(policy, groups, attention)
    assert distance(ours, exact) < 0.1
    assert (ours["hidden"].cpu() - exact["hidden"]).norm() < 0.02 * exact["hidden"].norm()


def test_attention_that_cannot_train_here_is_refused(flash_attn, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    flash = Config(attn_implementation="flash_attention_2")
    for cfg, device in ((Config(), cpu), (Config(), cuda), (flash, cuda)):
        check_attention(cfg, device)
    with pytest.raises(UserError, match="sdpa works everywhere"):
        check_attention(flash, cpu)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match="flash_attn"):
        check_attention(flash, cuda)


def test_pack_by_hand(questions):
    """Completions of 3 tokens and of 1: the row is the prompt and two tokens of the first."""
    question = questions[0]
    P, after = len(question.ids_P), int(question.positions_3P.max()) + 1
    group = Group(question, [torch.tensor([7, 8, 9]), torch.tensor([6])])
    ids, positions, sizes, rows = pack([group], pad_id=0)
    assert ids[0].tolist() == [*question.ids_P.tolist(), 7, 8]
    assert sizes == [[P, 2]]
    assert positions[:, 0, P:].tolist() == [[after, after + 1]] * 3
    assert rows[0].tolist() == [P - 1, P, P + 1, P - 1]
