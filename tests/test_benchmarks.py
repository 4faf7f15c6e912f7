"""The benchmarks on a machine without GPU: what they keep, what they leave out, what they print."""

import functools
import json
import subprocess
import sys

import conftest
import pytest
import torch
from torch.testing import assert_close

from benchmarks import gpu, head, peers, step
from benchmarks.origin import OUT_OF_MEMORY, Results, markdown
from kernels import tw_grpo_head

PROJECT, DEVICE = conftest.PROJECT, "cuda" if torch.cuda.is_available() else "cpu"


def test_the_official_computation_is_restated_faithfully():
    group = head.make_group(16, 8, 31, "cpu", torch.float64, [5, 9, 2])
    group["advantages_G"] = group["advantages_G"].double()
    assert_close(head.official(**group), tw_grpo_head(**group).loss)


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_what_is_timed_never_waits_for_the_gpu(impl, monkeypatch):
    """And is the head: with the lengths on the host beforehand, nothing is read back."""
    pytest.importorskip("triton")
    group = head.make_group(16, 8, 31, DEVICE, torch.float32, [5, 9, 2])
    forward, expected = head.ours(impl)(**group), tw_grpo_head(**group, impl="reference").loss

    def refuse(tensor):
        raise AssertionError("the host reads a value back")

    for name in ("tolist", "item", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    loss = forward()
    monkeypatch.undo()
    assert_close(loss, expected)


def test_a_test_is_skipped_only_for_what_the_machine_lacks(monkeypatch):
    """A codec that is not installed, however deep in the chain; not one that a test hides."""
    monkeypatch.setattr(conftest, "MISSING_CODECS", ["av"])
    error = ValueError("clip.mp4: cannot be decoded")
    error.__cause__ = ModuleNotFoundError("No module named 'av'", name="av")
    assert conftest.lacking(error).startswith("needs a video codec: the package av")
    error.__cause__ = ModuleNotFoundError("No module named 'decord'", name="decord")
    assert conftest.lacking(error) is None


# ------------------------------------------------------------------------------- the rows it keeps


def fails(error):
    raise error


def test_every_row_is_kept_whatever_happens_next(tmp_path, capsys):
    path, measured = tmp_path / "new" / "results.json", []

    def work(name):
        measured.append(name)
        return dict(ms=1.5)

    results = Results(path, dict(name="", ms=".1f"))
    results.measure(functools.partial(work, "a"), name="a")
    results.measure(lambda: fails(torch.OutOfMemoryError("CUDA out of memory")), name="b")
    results.measure(lambda: fails(ValueError("not today")), name="c")
    with pytest.raises(KeyboardInterrupt):
        results.measure(lambda: fails(KeyboardInterrupt()), name="d")
    kept = json.loads(path.read_text())
    assert {"device", "versions", "commit", "date"} <= kept.keys()
    assert [row.get("failed") for row in kept["rows"]] == [
        None, OUT_OF_MEMORY, "ValueError: not today"
    ]  # fmt: skip
    assert results.broken
    # The same command again measures what is missing and what failed, and nothing twice.
    again = Results(path, dict(name="", ms=".1f"))
    for name in "abcd":
        again.measure(functools.partial(work, name), name=name)
    assert measured == ["a", "c", "d"] and not again.broken
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["a", "b", "c", "d"]
    late = Results(path, dict(name=""), minutes=0)
    assert late.measure(functools.partial(work, "e"), name="e") is None
    assert "the time is over" in capsys.readouterr().out


@pytest.mark.parametrize("key, value", [("device", "another"), ("commit", "0000000")])
def test_results_of_another_machine_or_code_are_not_mixed_or_lost(tmp_path, key, value):
    path = tmp_path / "results.json"
    results = Results(path, {})
    results.about[key] = value
    results.add(dict(name="a"), {})
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=f"results of another {key}"):
        Results(path, {})
    assert path.read_bytes() == before
    path.write_text("[1, 2]")
    with pytest.raises(SystemExit, match="results.json: not a file of results"):
        Results(path, {})
    assert path.read_text() == "[1, 2]"


# --------------------------------------------------------------------------------------- one step


@pytest.fixture
def small(monkeypatch):
    """The sizes of the toy, completions of 3 and 4 tokens, and no package that can decode."""
    monkeypatch.setitem(step.SIZES, "tiny", {})
    monkeypatch.setattr(gpu, "PROMPT", 120)
    monkeypatch.setattr(gpu, "COMPLETIONS", (3, 4))
    monkeypatch.setitem(sys.modules, "av", None)


@pytest.mark.slow
def test_the_step_is_measured_without_a_codec_and_ours_first(small, tmp_path, monkeypatch):
    """And the official way, which needs more memory, cannot end it."""

    def too_large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    path = tmp_path / "step.json"
    flags = "--prompt 120 --num_generations 2 --repeats 1 --completion 3 4".split()
    arguments = step.parser().parse_args(flags)
    with monkeypatch.context() as patch:
        patch.setitem(step.WAYS, "official", too_large)
        step.run(arguments, Results(path, step.COLUMNS))
    rows = json.loads(path.read_text())["rows"]
    assert [(r["way"], r["completion"], r.get("failed")) for r in rows] == [
        ("ours", 3, None), ("ours", 4, None),
        ("official", 3, OUT_OF_MEMORY), ("official", 4, OUT_OF_MEMORY),
    ]  # fmt: skip
    step.run(arguments, Results(tmp_path / "both.json", step.COLUMNS))
    rows = json.loads((tmp_path / "both.json").read_text())["rows"]
    assert [r["way"] for r in rows] == ["ours"] * 2 + ["official"] * 2 + ["times faster"] * 2
    assert rows[4]["step_s"] == pytest.approx(rows[2]["step_s"] / rows[0]["step_s"])
    assert 0 < rows[0]["roofline"] <= 1 and rows[0]["decode_ms"] < 1e3 * rows[0]["rollout_s"]


def test_a_token_reads_the_language_model_once_and_the_keys_and_values():
    policy, _ = step.build("tiny", 120, "cpu")
    cfg = step.Config(num_generations=8, max_completion_length=10)
    weights = sum(p.numel() for n, p in policy.model.named_parameters()
                  if "visual" not in n and "embed_tokens" not in n)  # fmt: skip
    d, layers, heads = 512 // 8, 10, 2
    expected = 4 * (weights + (100 + 8 * 5) * layers * 2 * heads * d)
    assert step.bytes_of_a_token(policy, 100, cfg) == expected


def test_peers_are_measured_in_processes_of_their_own_and_the_missing_named(
    tmp_path, monkeypatch, capsys
):
    path, seconds = tmp_path / "peers.json", {"ours": [2.0, 1.0, 3.0], "official": [8.0, 6.0, 7.0]}
    monkeypatch.setattr(peers, "find_spec", lambda name: None)  # neither TRL nor Liger
    monkeypatch.setattr(
        peers, "one_round", lambda way, args: dict(step_s=seconds[way].pop(0), peak_gb=1.5)
    )
    monkeypatch.setattr(sys, "argv", ["peers", "--rounds", "3", "--json", str(path)])
    peers.main()
    assert "left out, not installed: TRL (trl)" in capsys.readouterr().out
    rows = {row["way"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == {"ours", "official"} and rows["official"]["rounds"] == 3
    shown = [rows["official"][k] for k in ("step_s", "fastest_s", "slowest_s", "times_ours")]
    assert shown == [7.0, 6.0, 8.0, 3.5]


@pytest.mark.slow
def test_a_round_of_ours_measures_time_and_memory(monkeypatch):
    flags = "--prompt 120 --completion 3 --num_generations 2 --repeats 1".split()
    row = peers.one_round("ours", peers.parser().parse_args(flags))
    assert row["step_s"] > 0 and 0.1 < row["peak_gb"] < 20


# ------------------------------------------------------------------------------- the one command


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_without_a_gpu_the_one_command_says_what_it_leaves_out(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", tmp_path, "--minutes", "9"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    for part in ("left out: `python -m pytest`", "No CUDA device", "left out: 7b needs a CUDA"):
        assert part in result.stdout


@pytest.mark.parametrize("minutes", ["nan", "0", "-1", "1e300"])
def test_minutes_that_are_none_are_refused_in_a_sentence(minutes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--minutes", minutes])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--minutes must be above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_step_of_the_one_command_and_its_table(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.faulthandler, "dump_traceback_later", lambda *a, **k: None)
    flags = ["gpu", "--out", str(tmp_path), "--part", "step", "--size", "tiny"]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit, match="0"):
        gpu.main()
    if not torch.cuda.is_available():
        assert "left out: --attn_implementation flash_attention_2" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--table"])
    gpu.main()
    printed = capsys.readouterr().out
    assert f"<!-- figures: {tmp_path}/step.json -->" in printed
    assert "| ours | sdpa |" in printed and "| times faster |" in printed


@pytest.mark.slow
def test_outcomes_of_tests_are_rows_and_only_failures_run_again(tmp_path):
    file, count = tmp_path / "test_it.py", tmp_path / "count"
    file.write_text(f"""
import pytest
def test_good():
    open({str(count)!r}, "a").write("x")
def test_bad():
    assert 1 == 2
@pytest.mark.skip(reason="no GPU")
def test_skipped():
    pass
""")
    options = ["-s", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={tmp_path}", file]
    for minutes in (0, 9, 9):  # the first ends after one test, the third repeats what failed
        results = Results(tmp_path / "correctness.json", gpu.OUTCOMES, minutes)
        pytest.main([str(option) for option in options], plugins=[gpu.Recorder(results)])
        assert len(results.rows) == (3 if minutes else 1)
    shown = gpu.table(tmp_path)
    rows = json.loads((tmp_path / "correctness.json").read_text())["rows"]
    outcomes = {row["test"].split("::")[1]: row["outcome"] for row in rows}
    assert outcomes == dict(test_good="passed", test_bad="failed", test_skipped="skipped")
    assert len(rows) == 3 and count.read_text() == "x"
    assert "1 tests passed, 1 tests skipped, 1 tests failed" in shown
    assert "test_it.py::test_bad: assert 1 == 2" in shown


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_with_its_minutes(tmp_path):
    code = """
import sys, time
from benchmarks import gpu
def hang(args, results):
    results.add(dict(way="ours"), {})
    time.sleep(60)
gpu.PARTS["step"] = (hang, {})
sys.argv = ["gpu", "--part", "step", "--minutes", "0.03", "--out", sys.argv[1]]
gpu.main()
"""
    command = [sys.executable, "-c", code, tmp_path]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=50)
    assert result.returncode == 1 and "in hang" in result.stderr
    assert json.loads((tmp_path / "step.json").read_text())["rows"] == [dict(way="ours")]


def test_the_table_comes_from_the_file(tmp_path):
    shape = dict(N=8192, D=3584, V=152064)
    done = dict(forward_ms=1.0, backward_ms=2.0, total_ms=3.0, spread_ms=0.1, tflops=4.0,
                peak_mb=5.0, forward_ratio=1.5, ratio=1.25)  # fmt: skip
    rows = [
        dict(impl="chunked", **shape, **done, note=""),
        dict(impl="Liger", **shape, note="no group weights", failed=OUT_OF_MEMORY),
    ]
    origin = dict(device="a device", date="a date", commit="a commit", dirty=False)
    results = origin | dict(versions={"torch": "9"}, rows=rows)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    printed = markdown(file, head.COLUMNS)
    assert "a device, a date, commit a commit" in printed
    assert "| chunked | 8192 | 3584 | 152064 | 1.0 | 2.0 | 3.0 |" in printed
    assert OUT_OF_MEMORY in printed and "no group weights" in printed
