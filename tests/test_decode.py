"""Decoding: the attention kernels, on a GPU or interpreted; what a step launches; the draw."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from kernel_cases import DEVICE
from test_fake_gpu import SMALL, model_and_question
from test_kernels import few
from test_policy import VISION, as_family

from data import Question
from kernels import decode
from kernels.compile_check import launch_decode
from model import rollout
from model.policy import Policy
from records import Record

pytest_plugins = ["test_fake_gpu"]
pytestmark = pytest.mark.slow
BLOCK = 16


def by_kernels(inputs):
    """Prompts of dozens of tokens take several pieces and blocks, a few rows several products."""
    with mock.patch.multiple(decode, BLOCK=BLOCK, MOST_ROWS=32, MULTIPROCESSORS=6):
        return decode.decode_attention(*inputs)


def exactly(inputs):
    """`group_attention` in float64: (output, and the own keys and values that it leaves)."""
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    wide[5:7] = [x.nan_to_num() for x in wide[5:7]]  # a product with 0 would keep a NaN
    return rollout.group_attention(*wide), *wide[8:10]


def step_inputs(lengths, G, K, shared, d, t, T, scale=1.0, dtype=torch.float32):
    """Arguments of an attention. What it must not read, padding and the time from t on, is NaN."""
    generator = torch.Generator().manual_seed(G + t)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, dtype)  # noqa: E731
    B, R, P = len(lengths), len(lengths) * G, max(lengths)
    new = [draw(R, K * shared, d) * scale, draw(R, K, d), draw(R, K, d)]
    angle_Rd = draw(R, d // 2).repeat(1, 2)
    prompt, own = draw(2, B, K, P, d), draw(2, R, K, T, d)
    own[:, :, :, t:] = torch.nan
    for b, length in enumerate(lengths):
        prompt[:, b, :, length:] = torch.nan
    lengths_B, t = (torch.tensor(x, device=DEVICE) for x in (lengths, [t]))
    return [*new, angle_Rd.cos(), angle_Rd.sin(), *prompt, lengths_B, *own, t, d**-0.5]


@few
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    G=st.integers(1, 16),
    heads=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 7)]),
    d=st.sampled_from([8, 16, 24]),
    t=st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]),
    scale=st.sampled_from([0.1, 1, 30]),
)
def test_the_kernels_equal_the_attention_in_float64(lengths, G, heads, d, t, scale):
    """Eq. 35: the output, and a cache in which nothing but position t has changed."""
    inputs = step_inputs(lengths, G, *heads, d, t, 3 * BLOCK + 1, scale)
    expected, *expected_own = exactly(inputs)
    assert_close(by_kernels(inputs).double(), expected, rtol=1e-4, atol=1e-5)
    for own, exact in zip(inputs[8:10], expected_own, strict=True):
        assert_close(own.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter multiplies no bf16")
@pytest.mark.parametrize("G", [1, 4, 8, 16])
def test_bfloat16_at_production_sizes(G):
    """Rounded to bf16 beside the inputs: the rotated query and key, shares, and the result."""
    inputs = step_inputs([1100, 37], G, 4, 7, 128, 100, 170, dtype=torch.bfloat16)
    assert_close(decode.launch(*inputs).double(), exactly(inputs)[0], rtol=2**-6, atol=2**-7)


def two_questions(policy, device):
    """Questions of 9 and 14 tokens, four of them a video's, and the features of the videos."""
    record, questions = Record("1", "", "<answer>A</answer>", Path()), []
    for words in (5, 10):
        ids_P = torch.tensor([7] * words + [policy.model.config.video_token_id] * 4)
        positions_3P = torch.arange(words + 4).expand(3, -1)
        questions.append(Question(record, "", ids_P, positions_3P, None, (1, 4, 4), 1.0))
    size = 4, policy.text.config.hidden_size
    return questions, [torch.ones(size, dtype=policy.compute_dtype, device=device)] * 2


@pytest.mark.skipif(DEVICE != "cpu", reason="decodes on the CPU, in the interpreter")
@pytest.mark.parametrize("kind", VISION)
def test_a_rollout_by_the_kernels_draws_the_same_tokens(kind, policy, monkeypatch):
    policy = as_family(kind, policy)
    policy.eos_ids = torch.tensor([-1])  # never end
    arguments = *two_questions(policy, "cpu"), 2, 6, 1.0, [(1,), (2,)]
    by_torch = policy.rollout(*arguments)
    monkeypatch.setattr(rollout, "attention_on", lambda device: lambda *x: by_kernels(x))
    for ours, theirs in zip(policy.rollout(*arguments), by_torch, strict=True):
        assert all(map(torch.equal, ours.completions, theirs.completions))
        assert (ours.sampled_logps_N - theirs.sampled_logps_N).abs().max() < 1e-5


class Launches(TorchDispatchMode):
    """Keeps the operators that launch a kernel on a GPU: all but views and what allocates."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = func.is_view or func is torch.ops.aten._unsafe_view.default
        if func.namespace != "prim" and not is_view:
            self.operators.append((func.name(), args))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind, most", [("qwen2_5_vl", 15), ("qwen2_vl", 15), ("qwen3_vl", 17)])
def test_a_step_reads_prompts_once_and_takes_few_kernels(kind, most, gpu, monkeypatch):
    """In each layer, and 60 around them; those of transformers launch 64. Qwen3-VL of toy size."""
    base, _ = model_and_question(**SMALL | dict(num_hidden_layers=3))
    with torch.device("cuda"):
        model = as_family(kind, base).model
    policy = Policy(model, base.tokenizer, base.chat_template)

    def one_kernel(x, shape, weight, eps):  # torch without CUDA would take rms_norm apart,
        assert x.dtype == weight.dtype == torch.bfloat16  # and with CUDA if these differed
        return x * weight

    with torch.no_grad(), policy.gathered() as actor, Launches() as launches:
        questions, features = two_questions(actor, "cuda")
        monkeypatch.setattr(torch.nn.functional, "rms_norm", one_kernel)
        actor.rollout(questions, features, 8, 2, 1.0, [(1,), (2,)])
    places = [i for i, (name, _) in enumerate(launches.operators) if "decode_attention" in name]
    assert places[1] - places[0] == places[2] - places[1] == most - 1  # the attention is two
    assert places[3] - places[0] <= 3 * (most - 1) + 60  # from step to step, of three layers
    _, arguments = launches.operators[places[-1]]
    cached, (_, K, _, d) = [*arguments[5:7], *arguments[8:10]], arguments[5].shape
    # Keys and values in bf16: of two prompts, padded, and of 16 rows that end after 2 tokens.
    assert sum(x.nbytes for x in cached) == 2 * 2 * K * d * (2 * 14 + 16 * 2)


@pytest.mark.parametrize("B, G, P", [(1, 8, 2300), (1, 1, 64), (2, 16, 1100), (64, 8, 130)])
def test_no_two_programs_read_the_same_part_of_a_prompt(B, G, P, monkeypatch):
    monkeypatch.setattr(decode, "join_kernel", mock.MagicMock())
    monkeypatch.setattr(decode, "prompt_kernel", kernel := mock.MagicMock())
    launch_decode(G, B, P=P)
    programs, pieces, products = kernel.__getitem__.call_args.args[0]
    piece = kernel.__getitem__.return_value.call_args.args[13]
    assert (programs, products) == (4 * B, 1) and (pieces - 1) * piece < P <= pieces * piece
    assert piece == 64 or programs * pieces > 132 / 2  # an H200 is not half empty


@given(
    V=st.sampled_from([5, 410, 512, 513, 3000]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    scale=st.sampled_from([0.0, 1.0, 20.0]),
    seed=st.integers(0, 999),
)
def test_the_draw_in_two_levels_is_that_of_one_scan(V, temperature, scale, seed):
    """At 0, at the last number below 1 and just below the borders of words, some of them banned."""
    generator = torch.Generator().manual_seed(seed)
    logits_RV = torch.randn(50, V, generator=generator) * scale
    banned_V = torch.rand(V, generator=generator) < 0.3
    banned_V[[0, 1, -1]] = torch.tensor([True, False, True])
    allowed_RV = (logits_RV / temperature).masked_fill(banned_V, -torch.inf)
    upto_RV = allowed_RV.softmax(-1).double().cumsum(-1)
    words_R1 = torch.randint(V, (50, 1), generator=generator)
    uniform_R1 = (upto_RV.gather(1, words_R1) / upto_RV[:, -1:] - 1e-12).clamp(min=0)
    uniform_R1[0], uniform_R1[-1] = 0, 1 - 2**-53
    tokens_R, _ = rollout.sample(logits_RV, temperature, uniform_R1[:, 0], banned_V)
    at_R1 = uniform_R1 * upto_RV[:, -1:]
    one_scan_R1 = torch.searchsorted(upto_RV, at_R1, right=True).clamp(max=V - 1)
    words_R2 = torch.cat([tokens_R[:, None], one_scan_R1], 1)
    nearest_R = (upto_RV.gather(1, words_R2) - at_R1).abs().amin(1)  # of the border between them
    same_R = words_R2[:, 0] == words_R2[:, 1]
    assert (same_R | (nearest_R < 1e-14)).all() and same_R.float().mean() > 0.9
    assert not banned_V[tokens_R].any()
