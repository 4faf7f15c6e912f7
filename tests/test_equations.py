"""What the weight really measures, docs/equations.md: its table, its claim, and the two benchmarks
that make data for the pages."""

import json

import numpy as np
from conftest import PROJECT
from PIL import Image

from benchmarks import walkthrough, weights
from benchmarks.origin import table

PAGE = (PROJECT / "docs" / "equations.md").read_text(encoding="utf-8")


def test_the_table_of_weights_is_the_measured_one():
    measured = json.loads((PROJECT / "benchmarks" / "weights.json").read_text(encoding="utf-8"))
    assert table(weights.rows(measured["groups"])) in PAGE
    for words in ("on {date} at commit {commit}", "one CPU thread in {seconds:.0f} s"):
        assert words.format(**measured) in PAGE
    assert len(measured["groups"]["toy completions"]) == 20


def test_ended_rows_dominate_the_official_weight_and_no_other():
    """The claim of the page on a fresh group, at a tenth of its vocabulary."""
    groups = {"fresh": [weights.synthetic_group(15000, 2.0, seed=7)]}
    for row in weights.rows(groups):
        is_official, ratio = row["form of D_t"] == "official", row["D, half or fewer / all alive"]
        assert ratio > 5 if is_official else ratio < 1
        assert (float(row["w, all alive: largest"]) < 1.15) == is_official
        assert float(row["w, half or fewer alive: largest"]) > 1.6 or not is_official


def test_the_benchmarks_write_what_the_pages_show(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "toy").symlink_to(world)
    small = dict(V=300, SEEDS=1, JSON=tmp_path / "w.json", PLOT=tmp_path / "w.png")
    for name, value in small.items():
        monkeypatch.setattr(weights, name, value)
    monkeypatch.setattr(walkthrough, "QUESTION", 1)
    monkeypatch.setattr(walkthrough, "OUT", tmp_path)
    monkeypatch.setattr("sys.argv", ["a benchmark", str(tmp_path)])
    weights.main()
    groups = json.loads((tmp_path / "w.json").read_text())["groups"]
    assert capsys.readouterr().out.strip() == table(weights.rows(groups))
    assert (tmp_path / "w.png").read_bytes()[1:4] == b"PNG"
    assert [len(several) for several in groups.values()] == [1, 1, 1, 20]
    for group in groups["toy completions"]:
        T = len(group["alive"])
        assert group["alive"][0] == 8 and T <= 20
        assert [len(D_T) for D_T in group["divergence"].values()] == [T] * 3

    walkthrough.main()
    data, shown = np.load(tmp_path / "walkthrough.npz"), np.load(PROJECT / "docs/walkthrough.npz")
    assert data.keys() == shown.keys()
    assert len(data["hidden_ND"]) == len(data["targets_N"]) == data["lengths_G"].sum()
    for frames, path in ((data, tmp_path), (shown, PROJECT / "docs")):
        picture = np.asarray(Image.open(path / "walkthrough.png"))
        assert (picture == np.asarray(walkthrough.picture(frames["frames_F3HW"]))).all()
