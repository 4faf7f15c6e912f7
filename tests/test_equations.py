"""docs/equations.md: its worked numbers from its own tables, and equations pinned nowhere else."""

import json
import math

import pytest
import torch
from conftest import PROJECT
from doc_checks import Table, all_shown, shows, tables
from torch.testing import assert_close

from benchmarks import weights
from kernels.reference import group_divergence, token_weights

PAGE = (PROJECT / "docs" / "equations.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())


def tables_of(test: str) -> list[Table]:
    """The page's tables that say they are recomputed by this test."""
    return [t for t in tables(PAGE) if t.mark.endswith(f"test_equations.py::{test}")]


def floats(rows: list[list[str]]) -> torch.Tensor:
    return torch.tensor([[float(cell) for cell in row] for row in rows], dtype=torch.float64)


def test_the_worked_group_is_what_the_page_says():
    """Eqs. 13 to 15 on two rows of four words, from the definitions, then by the functions."""
    steps, result = tables_of("test_the_worked_group_is_what_the_page_says")
    p = floats([line[1:] for line in steps.rows[:2]])
    q, m = p.mean(0), p.log().mean(0)
    d = m - p.log()
    k3, kl = d.exp() - d - 1, p * (p / q).log()
    lines = [*p, q, m.exp(), d[0] / math.log(2), k3[0], kl[0]]
    for line, values in zip(steps.rows, lines, strict=True):
        assert all_shown(line[1:], values), line[0]
    assert f"sums to {float(m.exp().sum()):.4f}, not to 1" in PAGE
    assert_close(p.sum(1), torch.ones_like(p[:, 0]))
    assert_close(k3[0].sum(), k3[1].sum())  # "the mirror image"
    for (form, cell), by_hand in zip(result.rows, (k3, kl), strict=True):
        by_code = group_divergence(p.log()[:, None], torch.tensor([1, 1]), form.split(",")[0])
        assert shows(cell, by_hand.sum(1).mean()) and shows(cell, by_code.item())


def test_the_two_divergences_rank_these_tokens_differently():
    rows, result = tables_of("test_the_two_divergences_rank_these_tokens_differently")
    p_TGV = floats([line[2:] for line in rows.rows]).view(3, 2, 4)
    assert_close(p_TGV.sum(-1), torch.ones(3, 2, dtype=torch.float64))
    assert (p_TGV[2, 0, 2] / p_TGV[2, 0, 3]).item() == pytest.approx(199)
    columns = dict(zip(result.header, zip(*result.rows, strict=True), strict=True))
    assert columns["position"] == ("agreed", "content", "tail")
    for form, order in (("official", [0, 1, 2]), ("textbook", [0, 2, 1])):
        D_T = group_divergence(p_TGV.log().transpose(0, 1), torch.tensor([3, 3]), form)
        assert all_shown(columns[f"D {form}"], D_T) and D_T.argsort().tolist() == order
        assert all_shown(columns[f"w {form}"], token_weights(D_T, 1.7))


@pytest.mark.parametrize("scale, ratio, reach", [(3.0, "1.72", "16"), (5.0, "27", "23")])
def test_what_the_clamp_takes_away(scale, ratio, reach):
    """Eq. 14 with and without it, on the rows and with the numbers the page names."""
    rows = weights.synthetic_rows(20 if scale == 3 else 5, 8, 152064, scale, seed=0).double()
    d = rows.mean(0) - rows
    without = (torch.expm1(d) - d).sum(-1).mean()
    clamped = group_divergence(rows[:, None], torch.ones(8, dtype=torch.int64))[0]
    assert shows(ratio, without / clamped) and shows(reach, d.abs().max())
    assert f"{ratio} times" in PAGE and f"reach {reach}" in PAGE


def test_what_bf16_logits_cost():
    """Eq. 8: D_t from logits rounded to bf16 against D_t from them in float32."""
    for scale in (1.0, 2.0, 3.0):
        logits = weights.synthetic_rows(5, 8, 152064, scale, seed=0)
        ones = torch.ones(8, dtype=torch.int64)
        exact = group_divergence(logits.double().log_softmax(-1)[:, None], ones)[0]
        wide = group_divergence(logits.log_softmax(-1)[:, None], ones)[0]
        half = group_divergence(logits.bfloat16().float().log_softmax(-1)[:, None], ones)[0]
        assert abs(wide / exact - 1) < 1e-5 and 1e-4 < abs(half / exact - 1) < 2e-3


@pytest.mark.parametrize("size, D, percent", [(1e-3, "0.076", "0.4"), (3e-4, "0.0068", "14")])
def test_the_literal_integrand_loses_the_digits_of_a_small_divergence(size, D, percent):
    """Eq. 22 in float32, term by term as written and as the code has it, against float64."""
    d = torch.randn(8, 152064, generator=torch.Generator().manual_seed(0)) * size
    exact = (torch.expm1(d.double()) - d.double()).sum(-1).mean()
    literal = (torch.exp(d) - d - 1).sum(-1).mean()
    ours = (torch.expm1(d) - d).sum(-1).mean()
    assert shows(D, exact) and shows(percent, 100 * abs(literal / exact - 1))
    assert abs(ours / exact - 1) < 1e-5
    assert D in PAGE and f"{percent} % off" in PAGE


# ------------------------------------------------------------------ what the weight really measures


@pytest.fixture(scope="module")
def measured():
    return json.loads((PROJECT / "benchmarks" / "weights.json").read_text(encoding="utf-8"))


def test_the_table_of_weights_is_the_measured_one(measured):
    assert weights.table(measured) in PAGE
    for sentence in (
        f"on {measured['date']} at commit {measured['commit']}, in float32 on one CPU thread",
        f"in {measured['seconds']:.0f} s",
        f"{measured['toy']['summary']['official']['groups']} of "
        f"{len(measured['toy']['groups'])} toy groups",
    ):
        assert sentence in TEXT, sentence


def test_the_measured_weights_follow_from_the_measured_divergence(measured):
    """Eqs. 16 and 17 on every D_t of the results, and the summary from the groups."""
    synthetic = measured["synthetic"]["groups"]
    for group in synthetic + measured["toy"]["groups"]:
        for form in weights.FORMS:
            w = token_weights(torch.tensor(group["divergence"][form]), measured["alpha"])
            assert_close(w, torch.tensor(group["weights"][form]), rtol=0, atol=2e-4)
    for scale, block in measured["synthetic"]["summary"].items():
        again = weights.summary([g for g in synthetic if g["scale"] == float(scale)])
        for name, value in again["official"].items():
            assert block["official"][name] == pytest.approx(value, rel=1e-3), name


def test_the_benchmark_writes_what_the_page_shows(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "toy").symlink_to(world)
    small = dict(V=300, SEEDS=1, JSON=tmp_path / "w.json", PLOT=tmp_path / "w.png")
    for name, value in small.items():
        monkeypatch.setattr(weights, name, value)
    monkeypatch.setattr("sys.argv", ["weights", str(tmp_path)])
    weights.main()
    result = json.loads((tmp_path / "w.json").read_text())
    assert capsys.readouterr().out.strip() == weights.table(result)
    assert (tmp_path / "w.png").read_bytes()[1:4] == b"PNG"
    assert len(result["synthetic"]["groups"]) == 3 and len(result["toy"]["groups"]) == 20
    for group in result["toy"]["groups"]:
        assert group["alive"][0] == 8 and len(group["alive"]) <= 20
        for form in weights.FORMS:
            w = group["weights"][form]
            assert len(w) == len(group["alive"]) and min(w) >= 1


def test_ended_rows_dominate_the_official_weight_and_no_other():
    """The claim of the page on a fresh group, at a tenth of its vocabulary."""
    group = weights.synthetic_group(15000, 2.0, seed=7)
    got = weights.summary([group])
    assert got["official"]["all_alive_max"] < 1.15 and got["official"]["half_or_fewer_max"] > 1.6
    assert got["official"]["divergence_ratio"] > 5
    for form in ("official, ended excluded", "textbook"):
        assert got[form]["all_alive_max"] > 1.6 and got[form]["divergence_ratio"] < 1
