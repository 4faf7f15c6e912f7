"""What only a GPU can show: bf16 in the fused design, memory and speed at real sizes; and, on
frames that need no codec, captured decoding and packed attention.

Memory is what the docstrings derive. Of the speed only what must never be: twice the time that the
arithmetic of a design takes. How fast it is, `python -m benchmarks.head` measures.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kernel_cases import make_group
from test_kernels import check_against_float64
from test_packing import groups, test_attention_on_a_gpu_equals_that_of_a_cpu  # noqa: F401
from test_policy import test_captured_steps_draw_the_tokens_of_eager_ones  # noqa: F401

import toy
from benchmarks import head, step
from data import Prompter
from records import Record
from video import Clip

pytestmark = pytest.mark.gpu
KERNELS = pytest.mark.parametrize("impl", ["chunked", "fused"])
IS_HOPPER = torch.cuda.get_device_capability()[0] == 9  # the limits of time are those of an H200


@KERNELS
@pytest.mark.parametrize("divergence", ["official", "textbook"])
@pytest.mark.parametrize("lengths", [[9, 4, 30, 1, 17, 5, 40, 22], [5, 3, 8], [3] * 16, [7]])
def test_bfloat16_at_production_sizes(impl, divergence, lengths):
    group = make_group(lengths, V=3001, D=256, off_policy=True, dtype=torch.bfloat16)
    check_against_float64(group, impl, cuts=nullcontext, divergence=divergence, beta=0.04)


LIMITS_MB = dict(chunked={8192: 2700, 32768: 3400}, fused={8192: 250, 32768: 750})
MATMULS = dict(chunked=4, fused=5)


@KERNELS
@pytest.mark.parametrize("N", [8192, 32768])
def test_memory_is_what_was_derived_and_time_less_than_twice_its_matmuls(impl, N):
    """Memory: see `kernels.backward.SLICE_ELEMENTS` and both forwards' docstrings."""
    three, ours = (head.measure(work, N) for work in (head.matmuls, partial(head.ours, impl)))
    torch.cuda.empty_cache()
    assert ours["peak_mb"] <= LIMITS_MB[impl][N]
    ratio = ours["total_ms"] / three["total_ms"]
    assert ratio <= 2 * MATMULS[impl] / 3 or not IS_HOPPER


# For the two tests that other files define, here on a machine without a codec too.


@pytest.fixture
def policy():
    return step.build("tiny", 120, "cpu")[0]


@pytest.fixture
def questions(policy):
    clip = Clip(torch.randint(255, (4, 3, 56, 56), dtype=torch.uint8), seconds=0.5)
    made = dict(load_clip=lambda *_: clip)
    prompter = Prompter(policy.tokenizer, toy.CHAT_TEMPLATE, policy.geometry, **made)
    problems = ("What?", "What? Look twice.", "What? Look closely, then look again.")
    records = [Record("1", text, "<answer>A</answer>", Path("frames")) for text in problems]
    return [prompter(record) for record in records]
