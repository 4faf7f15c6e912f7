"""The microbenchmark on a machine without GPU, and its table and plot from a results file."""

import json
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from kernels import bench, tw_grpo_head


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_without_cuda_it_says_so_and_exits_0():
    command = [sys.executable, "-m", "kernels.bench"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("No CUDA device")
    assert "chunked" in result.stdout and "reference" in result.stdout


def small_group(lengths, dtype=torch.float64):
    group = bench.make_group(sum(lengths), 8, 31, "cpu", dtype, lengths)
    return group | {"advantages_G": group["advantages_G"].to(dtype)}


def test_chunked_in_torch_is_the_reference():
    group = {k: v.detach() for k, v in small_group([5, 9, 2], torch.float32).items()}
    exact = tw_grpo_head(**group)
    del group["advantages_G"]
    logps, divergence = bench.chunked_in_torch(**group, chunk_positions=2)
    assert_close(logps, exact.logps_N, rtol=0, atol=1e-5)
    assert_close(divergence, exact.divergence_T, rtol=1e-5, atol=1e-6)


def test_the_official_computation_is_restated_faithfully():
    group = small_group([5, 9, 2])
    assert_close(bench.official(**group), tw_grpo_head(**group).loss)


def test_table_and_plot_come_from_the_file(tmp_path, capsys, monkeypatch):
    shape = dict(N=8192, D=3584, V=152064)
    done = dict(forward_ms=1.0, backward_ms=2.0, total_ms=3.0, spread_ms=0.1, tflops=4.0,
                peak_mb=5.0, forward_ratio=1.5, ratio=1.25)  # fmt: skip
    rows = [
        dict(impl="chunked", **shape, **done, note=""),
        dict(impl="Liger", **shape, note="no group weights", failed="OutOfMemoryError"),
    ]
    results = dict(device="a device", date="a date", commit="a commit", versions="v", rows=rows)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["bench", "--table", str(file)])
    bench.main()
    printed = capsys.readouterr().out
    assert "a device, a date, commit a commit" in printed
    assert "| chunked | 8192 | 3584 | 152064 | 1.0 | 2.0 | 3.0 |" in printed
    assert "OutOfMemoryError" in printed and "no group weights" in printed
    bench.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
