"""The ablation command on a small toy world: interrupted, continued, with a run that fails."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

from benchmarks import ablations

pytestmark = pytest.mark.slow


def command(work: Path, jobs: int) -> list[str]:
    module = [sys.executable, "-m", "benchmarks.ablations", "--settings", "alpha_1", "alpha_1.7"]
    short = ["grpo", "--seeds", "3", "--max_steps", "2", "--jobs", str(jobs)]
    return [*module, *short, "--work_dir", str(work), "--out", str(work / "a")]


def alive(work: Path) -> list[str]:
    """Processes whose command line names the work directory (on Linux; elsewhere none is found)."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            lines.append(path.read_bytes().decode(errors="replace"))
    return [line for line in lines if str(work) in line]


@pytest.fixture(scope="module")
def ablation(world, tmp_path_factory):
    """Ctrl-C after the first of three runs, then the same command again. A file stands where the
    third run should write, so that it fails. The world is already there."""
    work = tmp_path_factory.mktemp("ablation")
    (work / "seed3").mkdir()
    (work / "seed3" / "world").symlink_to(world)
    (work / "seed3" / "grpo").write_text("in the way")
    pipes = dict(cwd=PROJECT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # A script that starts pytest in the background has it ignore SIGINT, and us too.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command(work, jobs=1), **pipes) as first:
        next(line for line in first.stdout if "training_accuracy" in line)
        first.send_signal(signal.SIGINT)
        _, complaint = first.communicate(timeout=120)
    left, kept = alive(work), json.loads((work / "a.json").read_text())["rows"]
    second = subprocess.run(command(work, jobs=2), **pipes, timeout=240)
    return dict(work=work, first=(first.returncode, complaint, left), second=second, kept=kept)


def test_ctrl_c_kills_the_children_and_says_how_to_go_on(ablation):
    code, complaint, left = ablation["first"]
    assert code == 1 and complaint == "interrupted; the same command makes what is missing\n"
    assert left == []


def test_the_same_command_makes_only_what_is_missing(ablation):
    (kept,) = ablation["kept"]
    rows = json.loads((ablation["work"] / "a.json").read_text())["rows"]
    assert rows[0] == kept and kept["setting"] == "alpha_1"
    assert {row["setting"] for row in rows[1:]} == {"alpha_1.7", "grpo"}
    assert '"setting": "alpha_1",' not in ablation["second"].stdout


def test_a_failing_run_is_named_and_the_others_go_on(ablation):
    second, text = ablation["second"], (ablation["work"] / "a.md").read_text()
    assert second.returncode == 1 and "FileExistsError" in second.stdout
    assert "failed: grpo, seed 3." in text and re.search(r"^\| grpo \|( none \|)+$", text, re.M)


def test_the_table_holds_what_the_runs_measured(ablation):
    work = ablation["work"]
    rows = json.loads((work / "a.json").read_text())["rows"]
    runs = [row for row in rows if "failed" not in row]
    assert [run["setting"] for run in runs] == ["alpha_1", "alpha_1.7"]
    soft = {}
    for run in runs:
        measures = json.loads((work / "seed3" / run["setting"] / "eval.json").read_text())
        assert run["eval"] == measures
        soft[run["setting"]] = measures["after"]["sampled"]["soft"]
        lines = (work / "seed3" / run["setting"] / "metrics.jsonl").read_text().splitlines()
        rewards = [json.loads(line)["rewards/accuracy"] for line in lines]
        assert run["training_accuracy"] == pytest.approx(sum(rewards) / 2) and len(rewards) == 2
    assert runs[0]["eval"]["before"] == runs[1]["eval"]["before"]  # the same model and questions
    lines = {line["setting"]: line for line in ablations.compare(rows)}
    for name, value in soft.items():
        assert lines[name]["sampled_soft"] == f"{value:.3f}<br>{value:.3f} to {value:.3f}"
    difference = f"{soft['alpha_1.7'] - soft['alpha_1']:+.3f}<br>"
    assert lines["alpha_1.7"]["sampled_soft - alpha_1"].startswith(difference)
    assert (work / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_failing_process_is_told_by_its_last_words(tmp_path):
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "world").write_text("no world")
    with pytest.raises(RuntimeError, match="exit code 1: .*grpo is not empty; choose another"):
        ablations.Runs(tmp_path).make("grpo", 0, max_steps=1)


def test_the_committed_table_follows_from_the_numbers():
    out = PROJECT / "benchmarks" / "ablations"
    data = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    assert Path(f"{out}.md").read_text(encoding="utf-8") == ablations.markdown(data, "ablations")
    assert {row["setting"] for row in data["rows"]} == set(ablations.SETTINGS)
    assert not any("failed" in row for row in data["rows"])
    assert os.path.getsize(f"{out}.png") > 10_000
    steady = []  # what README says of the signs of the differences
    for name, measure in itertools.product(ablations.SETTINGS, ablations.PAIRED):
        values, base = (ablations.values_of(data["rows"], n, measure) for n in (name, "alpha_1"))
        steady += [(name, measure)] if min((values - base) * (values - base)[0]) > 0 else []
    assert steady == [("alpha_1.7", "sampled_soft")]
