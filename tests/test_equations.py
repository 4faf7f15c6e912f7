"""docs/equations.md: its worked numbers from its own tables, and equations pinned nowhere else."""

import json
import math

import pytest
import torch
from doc_checks import PROJECT, Table, tables
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from benchmarks import weights
from kernels.reference import group_divergence, token_weights, vocab_logps

PAGE = (PROJECT / "docs" / "equations.md").read_text(encoding="utf-8")


def tables_of(test: str) -> list[Table]:
    """The page's tables that say they are recomputed by this test."""
    return [t for t in tables(PAGE) if t.mark.endswith(f"test_equations.py::{test}")]


def floats(cells: list[str]) -> torch.Tensor:
    return torch.tensor([float(c) for c in cells], dtype=torch.float64)


def shown(value: float, cell: str) -> bool:
    """Is the cell this value, at the precision the cell has?"""
    return f"{value:.{len(cell.partition('.')[2])}f}".replace("-0.0000", "0.0000") == cell


def all_shown(values: torch.Tensor, cells: list[str]) -> bool:
    return all(shown(float(v), c) for v, c in zip(values, cells, strict=True))


def test_the_worked_group_is_what_the_page_says():
    """Eqs. 13 to 15 on two rows of four words, from the definitions, then by the functions."""
    steps, result = tables_of("test_the_worked_group_is_what_the_page_says")
    row = {line[0]: line[1:] for line in steps.rows}
    p = torch.stack([floats(row["p of completion 1"]), floats(row["p of completion 2"])])
    assert_close(p.sum(1), torch.ones(2, dtype=torch.float64))

    q, m = p.mean(0), p.log().mean(0)
    d = m - p.log()
    k3 = d.exp() - d - 1
    kl = p * (p / q).log()
    assert all_shown(q, row["q, arithmetic mean"])
    assert all_shown(m.exp(), row["exp m, geometric mean"])
    assert all_shown(d[0] / math.log(2), row["d of completion 1, in ln 2"])
    assert all_shown(k3[0], row["k3 of completion 1"])
    assert all_shown(kl[0], row["p log(p / q) of completion 1"])
    assert f"sums to {float(m.exp().sum()):.4f}, not to 1" in PAGE
    assert_close(k3[0].sum(), k3[1].sum())  # "the mirror image"

    values = {line[0].split(",")[0]: line[1] for line in result.rows}
    assert shown(k3.sum(1).mean().item(), values["official"])
    assert shown(kl.sum(1).mean().item(), values["textbook"])
    for form, cell in values.items():
        assert shown(group_divergence(p.log()[:, None], torch.tensor([1, 1]), form).item(), cell)


def test_the_two_divergences_rank_these_tokens_differently():
    rows, result = tables_of("test_the_two_divergences_rank_these_tokens_differently")
    names = list(dict.fromkeys(line[0] for line in rows.rows))
    p_TGV = torch.stack([floats(line[2:]) for line in rows.rows]).view(len(names), 2, -1)
    assert_close(p_TGV.sum(-1), torch.ones(len(names), 2, dtype=torch.float64))
    assert all(x / y == pytest.approx(199) for x, y in [(p_TGV[2, 0, 2], p_TGV[2, 0, 3])])
    columns = []
    for form in ("official", "textbook"):
        D = group_divergence(p_TGV.log().transpose(0, 1), torch.full((2,), len(names)), form)
        columns += [D, token_weights(D, 1.7)]
    for name, cells, values in zip(names, result.rows, torch.stack(columns, 1), strict=True):
        assert cells[0] == name and all_shown(values, cells[1:])
    official, textbook = columns[0].argsort().tolist(), columns[2].argsort().tolist()
    assert [names[t] for t in official] == ["agreed", "content", "tail"]
    assert [names[t] for t in textbook] == ["agreed", "tail", "content"]


@given(
    logits=st.lists(st.floats(-1000, 1000), min_size=1, max_size=40),
    block=st.integers(1, 17),
)
def test_the_running_log_sum_exp_in_any_cut(logits, block):
    """Eq. 21 as it stands, block by block, against the sum in one piece."""
    x = torch.tensor(logits, dtype=torch.float64)
    m, s = torch.tensor(-math.inf, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for part in x.split(block):
        m_new = torch.maximum(m, part.max())
        s = s * torch.exp(m - m_new) + torch.exp(part - m_new).sum()
        m = m_new
    assert_close(m + s.log(), x.logsumexp(0), rtol=1e-12, atol=1e-12)
    logps = vocab_logps(x[None, :1] * 0 + 1, x[:, None])  # one hidden unit: the logits themselves
    assert_close(logps[0], x - (m + s.log()), rtol=1e-12, atol=1e-9)


def test_the_textbook_integrand_is_k3_weighted_by_p():
    """Eq. 23: three ways to write the Jensen-Shannon divergence."""
    generator = torch.Generator().manual_seed(0)
    logps = (3 * torch.randn(4, 50, generator=generator, dtype=torch.float64)).log_softmax(-1)
    p = logps.exp()
    q = p.mean(0)
    delta = q.log() - logps
    left = (p * -delta).sum(-1).mean()
    middle = (p * -delta + q - p).sum(-1).mean()
    right = (p * (delta.exp() - delta - 1)).sum(-1).mean()
    assert_close(left, middle)
    assert_close(middle, right)
    assert ((p * (delta.exp() - delta - 1)) >= 0).all()
    code = group_divergence(logps[:, None], torch.ones(4, dtype=torch.int64), "textbook")[0]
    assert_close(code, right)


@pytest.mark.parametrize("scale, ratio, reach", [(3.0, "1.72", "16"), (5.0, "27", "23")])
def test_what_the_clamp_takes_away(scale, ratio, reach):
    """Eq. 14 with and without it, on the rows and with the numbers the page names."""
    rows = weights.synthetic_rows(20 if scale == 3 else 5, 8, 152064, scale, seed=0).double()
    d = rows.mean(0) - rows
    without = (torch.expm1(d) - d).sum(-1).mean()
    clamped = group_divergence(rows[:, None], torch.ones(8, dtype=torch.int64))[0]
    assert shown(float(without / clamped), ratio) and shown(float(d.abs().max()), reach)
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
    assert shown(float(exact), D) and shown(100 * abs(float(literal / exact) - 1), percent)
    assert abs(float(ours / exact) - 1) < 1e-5
    assert D in PAGE and f"{percent} % off" in PAGE


# ------------------------------------------------------------------ what the weight really measures


@pytest.fixture(scope="module")
def measured():
    return json.loads((PROJECT / "benchmarks" / "weights.json").read_text(encoding="utf-8"))


def test_the_table_of_weights_is_the_measured_one(measured):
    assert weights.table(measured) in PAGE
    text = " ".join(PAGE.split())
    said = f"on {measured['date']} at commit {measured['commit']}, in float32 on one CPU thread"
    assert said in text and f"in {measured['seconds']:.0f} s" in text
    synthetic, toy = measured["synthetic"]["summary"].values(), measured["toy"]["summary"]

    def span(form, key):
        values = [block[form][key] for block in synthetic]
        return f"{min(values):.2f} to {max(values):.2f}"

    largest = max(block["official"]["all_alive_max"] for block in synthetic)
    for sentence in (
        f"at most {largest:.3f} on synthetic rows and {toy['official']['all_alive_max']:.3f} on",
        f"their mean is {span('official', 'half_or_fewer_mean')};",
        f"few tokens only, it is {toy['official']['half_or_fewer_mean']:.2f}.",
        f"on synthetic rows {span('textbook', 'all_alive_mean')} in the mean",
        f"where all live, {span('textbook', 'last_position_mean')} at the last position;",
        f"on the toy's rows {toy['textbook']['all_alive_mean']:.2f} and "
        f"{toy['textbook']['last_position_mean']:.2f}.",
        f"{toy['official']['groups']} of {len(measured['toy']['groups'])} toy groups",
    ):
        assert sentence in text, sentence


def test_the_measured_weights_follow_from_the_measured_divergence(measured):
    """Eqs. 16 and 17 on every D_t of the results, and the summary from the groups."""
    synthetic = measured["synthetic"]["groups"]
    for group in synthetic + measured["toy"]["groups"]:
        for form in weights.FORMS:
            w = token_weights(torch.tensor(group["divergence"][form]), measured["alpha"])
            assert_close(w, torch.tensor(group["weights"][form]), rtol=0, atol=2e-4)
    for scale, block in measured["synthetic"]["summary"].items():
        again = weights.summary([g for g in synthetic if g["scale"] == float(scale)])
        assert again["official"]["all_alive_mean"] == pytest.approx(
            block["official"]["all_alive_mean"], abs=1e-3
        )


def test_the_benchmark_writes_what_the_page_shows(tmp_path, monkeypatch, capsys):
    paths = ["--json", str(tmp_path / "w.json"), "--plot", str(tmp_path / "w.png")]
    monkeypatch.setattr("sys.argv", ["weights", "--vocabulary", "300", "--seeds", "1", *paths])
    weights.main()
    result = json.loads((tmp_path / "w.json").read_text())
    assert capsys.readouterr().out.strip() == weights.table(result)
    assert (tmp_path / "w.png").read_bytes()[1:4] == b"PNG"
    assert len(result["synthetic"]["groups"]) == 3


def test_groups_of_the_toy_are_weighed_by_every_form(world, tmp_path):
    (tmp_path / "toy").symlink_to(world)
    groups = weights.toy_groups(tmp_path, 2)
    assert len(groups) == 2
    for group in groups:
        T = len(group["alive"])
        assert group["alive"][0] == 8 and T <= 20
        assert set(group["weights"]) == set(weights.FORMS)
        assert all(len(w) == T and min(w) >= 1 for w in group["weights"].values())


def test_ended_rows_dominate_the_official_weight_and_no_other():
    """The claim of the page on a fresh group, at a tenth of its vocabulary."""
    group = weights.synthetic_group(15000, 2.0, seed=7, lengths=weights.LENGTHS)
    got = weights.summary([group])
    assert got["official"]["all_alive_max"] < 1.15 and got["official"]["half_or_fewer_max"] > 1.6
    assert got["official"]["divergence_ratio"] > 5
    for form in ("official, ended excluded", "textbook"):
        assert got[form]["all_alive_max"] > 1.6 and got[form]["divergence_ratio"] < 1
