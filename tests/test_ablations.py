"""The ablation: its statistics, and its command on a small world, interrupted and continued."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT

import toy
from benchmarks import ablations
from benchmarks.origin import table

OUT = PROJECT / "benchmarks" / "ablations"
DATA = json.loads(Path(f"{OUT}.json").read_text(encoding="utf-8"))
PAGE = Path(f"{OUT}.md").read_text(encoding="utf-8")

# --------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(  # two-sided, from a printed table of Student's t
    ("df", "half", "five", "one"),
    [(1, 1.0, 12.706, 63.657), (7, 0.711, 2.365, 3.499), (30, 0.683, 2.042, 2.750)],
)
def test_students_t_is_that_of_the_tables(df, half, five, one):
    values, below = ablations.student(df)
    assert np.interp([0.5, 0.95, 0.99], below, values) == pytest.approx([half, five, one], rel=1e-3)


def test_a_paired_comparison():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 3.464 with 2 degrees of freedom,
    whose distribution is elementary: p = 1 - t / sqrt(2 + t^2)."""
    mean, half, p = ablations.paired(np.array([1.0, 2.0, 3.0]))
    assert (mean, half) == pytest.approx((2.0, 4.3027 / 3**0.5), rel=1e-4)
    assert p == pytest.approx(1 - 12**0.5 / 14**0.5, rel=1e-4)
    assert ablations.paired(np.array([0.0, 0.0]))[2] == 1.0  # the same runs
    assert ablations.paired(np.array([0.5]))[0] == 0.5
    assert np.isnan(ablations.paired(np.array([0.5]))[1:]).all()


def test_holm_steps_down_over_the_known():
    p_values = dict(a=0.01, b=0.04, c=0.03, d=np.nan)
    assert ablations.holm(p_values) == pytest.approx(dict(a=0.03, c=0.06, b=0.06))
    assert ablations.holm(dict(a=0.5, b=0.5)) == dict(a=1.0, b=1.0)


AREAS = dict(none=(0.5, 0.6, 0.7), official=(0.6, 0.8, 1.0), grpo=(0.5, 0.7, 0.7, 0.1))
OTHERS = "final sampled shuffled_frames completion_length length_spread weight_range".split()
ROWS = [
    dict(setting=name, seed=seed, area=area, **dict.fromkeys(OTHERS, 10 * area))
    for name, areas in AREAS.items()
    for seed, area in enumerate(areas)
]


def test_the_tables_by_hand():
    """Differences .1, .2, .3 have p = .0742, and 0, .1, 0 have .4226. Holm doubles the smaller. A
    seed without a run of BASE, and a run that failed, take no part in the differences."""
    rows = [*ROWS, dict(setting="null", seed=0, failed="no memory")]
    grpo, official, none = ablations.compare(rows)
    assert official["area less none"] == "+0.200 ± 0.248" and official["p"] == "0.148"
    assert grpo["area less none"] == "+0.033 ± 0.143" and grpo["p"] == "0.423"
    assert (grpo["setting"], grpo["seeds"], grpo["area"]) == ("grpo", 3, "0.500")
    assert none["area"] == "0.600" and "p" not in none
    assert ablations.describe(rows)[1]["held-out accuracy"] == "8.000"
    lines = ablations.compare([row for row in ROWS if row["seed"] == 0])
    assert lines[1]["area less none"] == "+0.100 ± nan" and not any("p" in line for line in lines)


# -------------------------------------------------------------------------------------- the command


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(work: Path) -> list[dict]:
    return json.loads((work / "ablations.json").read_text())["rows"]


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    """Ctrl-C after the first run of seed 3, then the same command again. The world of seed 3 is
    already there; something else is in the place of seed 4's."""
    work = tmp_path_factory.mktemp("ablation")
    toy.prepare(work / "seed3" / "world", seed=3, toy="events", train=16, test=4, steps=10)
    (work / "seed4" / "world").mkdir(parents=True)
    command = [sys.executable, "-m", "benchmarks.ablations", "--settings", "none", "official"]
    command += f"--seeds 4 3 --max_steps 2 --jobs 1 --work_dir {work}".split()
    pipes = dict(cwd=PROJECT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # A script that starts pytest in the background has it ignore SIGINT, and us too.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, **pipes) as first:
        next(line for line in first.stdout if "length_spread" in line)
        first.send_signal(signal.SIGINT)
        _, complaint = first.communicate(timeout=120)
    assert complaint.endswith("interrupted; rerun the command to make what is missing\n")
    assert first.returncode == 1
    kept = rows_of(work)
    return work, kept, subprocess.run(command, **pipes, timeout=240)


@pytest.mark.slow
def test_the_same_command_makes_only_what_is_missing_and_a_failure_ends_nothing_else(ablation):
    work, kept, second = ablation
    (run,), rows = [row for row in kept if "failed" not in row], rows_of(work)
    assert run in rows and sorted(row["seed"] for row in rows) == [3, 3, 4, 4]
    assert json.dumps(dict(setting=run["setting"], seed=3))[:-1] not in second.stdout
    assert second.returncode == 1 and "| official | 1 |" in second.stdout
    failed = [row for row in rows if "failed" in row]
    assert [row["seed"] for row in failed] == [4, 4]
    for row in failed:
        assert row["failed"].startswith("RuntimeError: exit code 1: ")
        assert "is not the world of --toy events --seed 4" in row["failed"]


@pytest.mark.slow
def test_a_row_holds_what_the_run_measured(ablation):
    work, _, _ = ablation
    for run in (row for row in rows_of(work) if row["seed"] == 3):
        out = work / "seed3" / run["setting"]
        evaluated = json.loads((out / "eval.json").read_text())
        assert run["eval"] == evaluated and "before" not in evaluated
        assert run["sampled"] == evaluated["after"]["sampled"]["soft"]
        rewards = [row["rewards/accuracy"] for row in lines(out / "metrics.jsonl")]
        assert run["area"] == pytest.approx(np.mean(rewards)) and len(rewards) == 2
        spreads, ranges = [], []
        for group in lines(out / "completions.jsonl"):
            lengths = sorted(len(c["token_ids"]) for c in group["completions"])
            spreads.append((lengths[-1] - lengths[0]) * len(lengths) / sum(lengths))
            weights = group["weights"][: lengths[0]]
            ranges.append(max(weights) - min(weights))
        assert run["length_spread"] == pytest.approx(sum(spreads) / 2)
        assert run["weight_range"] == pytest.approx(sum(ranges) / 2)
        assert (run["weight_range"] == 0.0) == (run["setting"] == "none")
    assert (work / "ablations.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------------ what is shown


def test_the_committed_page_follows_from_the_numbers():
    rows = DATA["rows"]
    keys = [(row["setting"], row["seed"], row["max_steps"]) for row in rows]
    assert sorted(keys) == sorted(itertools.product(ablations.SETTINGS, range(8), [80]))
    assert table(ablations.compare(rows)) in PAGE and table(ablations.describe(rows)) in PAGE
    assert not any("failed" in row for row in rows)
    assert all(told in PAGE for told in (DATA["commit"], DATA["date"], DATA["machine"]["cpu"]))
    assert os.path.getsize(f"{OUT}.png") > 10_000


def test_what_the_page_says_beside_its_tables():
    """The numbers of its text that its tables do not show."""
    runs, page = ablations.by_setting(DATA["rows"]), " ".join(PAGE.split())

    def less(setting, other="none", measure="area"):
        return ablations.paired(ablations.differences(runs[setting], runs[other], measure))

    areas = {name: less(name) for name in runs if name != "none"}
    assert max(abs(change) + half for change, half, _ in areas.values()) < 0.022
    curve, shifted = ablations.mean(runs["none"], "curve"), "{:+.3f} ± {:.3f}"
    drop = [row["sampled"] - row["shuffled_frames"] for row in runs["official"].values()]
    for words in (
        f"rises from {curve[0]:.2f} to {curve[-1]:.2f}",
        f"differ in length by {np.mean([r['length_spread'] for r in DATA['rows']]):.0%}",
        f"`official_mean_1` is {shifted.format(*less('shuffled', 'official_mean_1'))},",
        f"`position` less it {shifted.format(*less('position', 'official_mean_1'))}.",
        f"accuracy is {shifted.format(*less('grpo', measure='sampled'))[1:]} higher",
        "falls by {:.2f} ± {:.2f}.".format(*ablations.paired(np.array(drop))),
    ):
        assert words.replace("%", " %") in page, words
