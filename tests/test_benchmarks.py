"""The benchmarks on a machine without GPU: the rows they keep, and what they measure."""

import functools
import json
import sys

import conftest
import pytest
import torch

from benchmarks import head, peers, step
from benchmarks.origin import Results, table


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
@pytest.mark.parametrize("options", [{}, dict(frozen=True), dict(lengths=[5, 9, 2])])
def test_the_head_is_timed_beside_three_matmuls(options, monkeypatch):
    """On a CPU, where nothing is published."""
    pytest.importorskip("triton")
    for name, value in dict(D=8, V=31, DEVICE="cpu").items():
        monkeypatch.setattr(head, name, value)
    for prepare in (head.matmuls, functools.partial(head.ours, "chunked")):
        row = head.measure(prepare, 16, **options)
        assert row["total_ms"] == pytest.approx(row["forward_ms"] + row["backward_ms"])
        products = 2 if options.get("frozen") else 3
        flop = 2 * products * 16 * 8 * 31
        assert row["tflops"] == pytest.approx(flop / row["total_ms"] / 1e9)


def test_a_test_is_skipped_only_for_what_the_machine_lacks(monkeypatch):
    """A codec that is not installed, however deep in the chain; not one that a test hides."""
    monkeypatch.setattr(conftest, "MISSING_CODECS", ["av"])
    error = ValueError("clip.mp4: cannot be decoded")
    error.__cause__ = ModuleNotFoundError("No module named 'av'", name="av")
    assert conftest.lacking(error).startswith("needs a video codec: the package av")
    error.__cause__ = ModuleNotFoundError("No module named 'decord'", name="decord")
    assert conftest.lacking(error) is None


# ------------------------------------------------------------------------------- the rows it keeps


def test_every_row_is_kept_whatever_happens_next(tmp_path):
    path, measured = tmp_path / "new" / "results.json", []
    errors = dict(b=torch.OutOfMemoryError("CUDA out of memory"), c=ValueError("not today"))
    errors["d"] = KeyboardInterrupt()

    def work(name):
        measured.append(name)
        if name in errors:
            raise errors[name]
        return dict(ms=1.5)

    results = Results(path)
    with pytest.raises(KeyboardInterrupt):
        for name in "abcd":
            results.measure(work, name=name)
    kept = json.loads(path.read_text())
    assert {"device", "versions", "commit", "date"} <= kept.keys()
    reasons = [None, "OutOfMemoryError: CUDA out of memory", "ValueError: not today"]
    assert [row.get("failed") for row in kept["rows"]] == reasons
    # The same command again measures what is missing and what failed, and nothing twice.
    errors.clear()
    again = Results(path)
    for name in "abcd":
        again.measure(work, name=name)
    assert measured == [*"abcd", *"bcd"]
    assert json.loads(path.read_text())["rows"] == [dict(name=name, ms=1.5) for name in "abcd"]


@pytest.mark.parametrize("key, value", [("device", "another"), ("commit", "0000000")])
def test_results_of_another_machine_or_code_are_not_mixed_or_lost(tmp_path, key, value):
    path = tmp_path / "results.json"
    results = Results(path)
    results.about[key] = value
    results.add(dict(name="a"), {})
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=f"is from another {key}"):
        Results(path)
    assert path.read_bytes() == before


def test_a_table_has_a_column_for_every_value():
    rows = [dict(impl="chunked", N=8192, total_ms=3.0), dict(impl="Liger", failed="no memory")]
    assert table(rows).splitlines() == [
        "| impl | N | total_ms | failed |",
        "| --- | --- | --- | --- |",
        "| chunked | 8192 | 3.00 |  |",
        "| Liger |  |  | no memory |",
    ]


# --------------------------------------------------------------------------------------- one step


@pytest.mark.slow
def test_the_step_is_measured_without_a_codec_and_ours_first(tmp_path, monkeypatch):
    """And the official way, which needs more memory, cannot end it."""

    def too_large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(step.SIZES, "tiny", {})
    monkeypatch.setitem(sys.modules, "av", None)
    path = tmp_path / "step.json"
    flags = f"step --prompt 120 --num_generations 2 --repeats 1 --completion 3 4 --json {path}"
    monkeypatch.setattr(sys, "argv", flags.split())
    ways = [("ours", 3), ("ours", 4), ("official", 3), ("official", 4)]
    for official in (too_large, step.official):  # the second time, what failed is measured
        monkeypatch.setitem(step.WAYS, "official", official)
        step.main()
        rows = json.loads(path.read_text())["rows"]
        rows = [row for row in rows if row["attn_implementation"] == "sdpa"]
        assert [(row["way"], row["max_completion_length"]) for row in rows] == ways
        assert ["failed" in row for row in rows[2:]] == [official is too_large] * 2
    phases = [rows[0][f"{name}_s"] for name in "data rollout score backward optimizer".split()]
    assert rows[0]["step_s"] == pytest.approx(sum(phases)) and rows[0]["tokens"] == 109
    assert 0 < rows[0]["decode_ms"] < 1e3 * rows[0]["rollout_s"]
    unread = ("visual", "embed_tokens", "language_model.norm")
    model = step.build("tiny", 120, "cpu")[0].model.named_parameters()
    read = sum(4 * p.numel() for name, p in model if not any(part in name for part in unread))
    assert rows[0]["read_gb_s"] * rows[0]["decode_ms"] == pytest.approx(read / 1e6)


@pytest.mark.slow
def test_peers_are_measured_in_turn_each_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    row = peers.one_round("ours", dict(prompt=120, num_generations=2, max_completion_length=3))
    assert row["step_s"] > 0 and 0.1 < row["peak_gb"] < 20
    path, seconds = tmp_path / "peers.json", dict(ours=[2.0, 1.0, 3.0], official=[8.0, 6.0, 7.0])
    one_round = lambda way, shape: dict(step_s=seconds[way].pop(0), peak_gb=1)  # noqa: E731
    monkeypatch.setattr(peers, "one_round", one_round)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["peers", "--rounds", "3", "--json", str(path)])
    peers.main()
    assert "left out, not installed: TRL" in capsys.readouterr().out
    rows = {row["way"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == {"ours", "official"} and rows["official"]["rounds"] == 3
    shown = [rows["official"][k] for k in ("step_s", "fastest_s", "slowest_s", "times_ours")]
    assert shown == [7.0, 6.0, 8.0, 3.5]
