"""What only a GPU can show: bf16 in the fused design, memory and speed at real sizes.

Numbers 3 and 4 of the specification, for one H200-class GPU; other GPUs skip the speed.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kernel_cases import make_group
from test_kernels import check_against_float64

from kernels import bench, token_logps
from kernels.head import Sizes

D, V = 3584, 152064
KERNELS = pytest.mark.parametrize("impl", ["chunked", "fused"])
HOPPER = pytest.mark.skipif(
    torch.cuda.get_device_capability()[0] != 9, reason="the limits are those of an H200"
)


@KERNELS
@pytest.mark.parametrize("divergence", ["official", "textbook"])
@pytest.mark.parametrize("lengths", [[9, 4, 30, 1, 17, 5, 40, 22], [5, 3, 8], [3] * 16, [7]])
def test_bfloat16_at_production_sizes(impl, divergence, lengths):
    group = make_group(lengths, V=3001, D=256, off_policy=True, dtype=torch.bfloat16)
    check_against_float64(group, impl, sizes=Sizes(), divergence=divergence, beta=0.04)


def measured(impl, N, lengths=None, frozen=False):
    group = bench.make_group(N, D, V, "cuda", torch.bfloat16, lengths)
    group["weight_VD"].requires_grad_(not frozen)
    row = bench.measure(impl, bench.variants()[impl], group, bench.matmul_ceiling(N, D, V))
    torch.cuda.empty_cache()
    return row


@pytest.mark.parametrize(
    "impl, N, limit_mb",
    [
        ("chunked", 8192, 1300),
        ("chunked", 32768, 1500),
        ("fused", 8192, 250),
        ("fused", 32768, 750),
    ],
)
def test_extra_memory(impl, N, limit_mb):
    """Derived at `kernels.head.words_of_backward` and in both forwards' docstrings."""
    assert measured(impl, N)["peak_mb"] <= limit_mb


def test_token_logps_hold_one_chunk_of_logits():
    group = bench.make_group(8192, D, V, "cuda", torch.bfloat16)
    arguments = [group[k] for k in ("hidden_ND", "weight_VD", "targets_N")]
    token_logps(*arguments)  # workspaces are allocated once
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    token_logps(*arguments)
    assert torch.cuda.max_memory_allocated() - before <= 1.3e9


@HOPPER
@pytest.mark.parametrize("N", [8192, 32768])
def test_speed(N):
    chunked, fused = measured("chunked", N), measured("fused", N)
    assert chunked["ratio"] <= 1.70 and chunked["forward_ratio"] <= 1.45
    assert fused["ratio"] <= 2.4


@HOPPER
def test_frozen_head_and_ragged_group_cost_less():
    dense = measured("chunked", 8192)
    frozen = measured("chunked", 8192, frozen=True)
    one_matmul = dense["total_ms"] / dense["ratio"] / 3
    assert frozen["total_ms"] <= 3.4 * one_matmul
    lengths = [int(1024 * (0.2 + 0.8 * i / 7)) for i in range(8)]
    ragged = measured("chunked", 8192, lengths)
    assert ragged["total_ms"] <= 0.65 * dense["total_ms"]
