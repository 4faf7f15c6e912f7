"""The ablation command on a small toy world: interrupted, continued, with a run that fails."""

import contextlib
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

SETTINGS = ["alpha_1", "alpha_1.7", "grpo"]
pytestmark = pytest.mark.slow


def command(work: Path, *flags: str) -> list[str]:
    short = ["--seeds", "3", "--max_steps", "2", "--work_dir", str(work), "--out", str(work / "a")]
    module = [sys.executable, "-m", "benchmarks.ablations"]
    return [*module, "--settings", *SETTINGS, *short, *flags]


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
    first = subprocess.Popen(
        command(work, "--jobs", "1"),
        cwd=PROJECT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A script that starts pytest in the background has it ignore SIGINT, and us too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        for line in first.stdout:
            if "alpha_1, seed 3: done" in line:
                break
        first.send_signal(signal.SIGINT)
        _, complaint = first.communicate(timeout=120)
    finally:
        first.kill()
    left = alive(work)
    untouched = (work / "seed3" / "alpha_1" / "eval.json").stat().st_mtime_ns
    second = subprocess.run(
        command(work, "--jobs", "2"), cwd=PROJECT, capture_output=True, text=True, timeout=240
    )
    return dict(
        work=work,
        first=(first.returncode, complaint, left),
        second=second,
        untouched=untouched,
    )


def test_ctrl_c_kills_the_children_and_says_how_to_go_on(ablation):
    code, complaint, left = ablation["first"]
    assert code == 1 and complaint == "interrupted; the same command makes what is missing\n"
    assert left == []


def test_the_same_command_makes_only_what_is_missing(ablation):
    out = ablation["second"].stdout
    assert "1 of 3 runs are there" in out and "alpha_1.7, seed 3: done" in out
    assert "alpha_1, seed 3" not in out
    kept = ablation["work"] / "seed3" / "alpha_1" / "eval.json"
    assert kept.stat().st_mtime_ns == ablation["untouched"]


def test_a_failing_run_is_named_and_the_others_go_on(ablation):
    second = ablation["second"]
    assert second.returncode == 1 and "Traceback" not in second.stderr
    assert "grpo, seed 3: exit code 1" in second.stdout
    assert "grpo cannot be written" in second.stdout  # what the run itself said last
    text = (ablation["work"] / "a.md").read_text()
    assert "Missing, because the run failed: grpo, seed 3." in text
    assert re.search(r"^\| grpo \|( none \|)+$", text, re.M)


def test_the_table_holds_what_the_runs_measured(ablation):
    work = ablation["work"]
    data = json.loads((work / "a.json").read_text())
    assert [run["setting"] for run in data["runs"]] == ["alpha_1", "alpha_1.7"]
    before, soft = [], {}
    for run in data["runs"]:
        measures = json.loads((work / "seed3" / run["setting"] / "eval.json").read_text())
        assert run["eval"] == measures
        before.append(measures["before"])
        soft[run["setting"]] = measures["after"]["sampled"]["soft"]
        lines = (work / "seed3" / run["setting"] / "metrics.jsonl").read_text().splitlines()
        rewards = [json.loads(line)["rewards/accuracy"] for line in lines]
        assert run["measures"]["training_accuracy"] == pytest.approx(sum(rewards) / 2)
        assert len(rewards) == 2 and run["cpu_seconds"] > 1 and "commit" in run
    assert before[0] == before[1]  # the same model, the same questions
    head, *rows = ablations.table_rows(data)
    place, cells = head.index("sampled soft"), {row[0]: row for row in rows}
    for name, words in (("alpha_1", "alpha 1"), ("alpha_1.7", "alpha 1.7")):
        assert cells[words][place] == f"{soft[name]:.3f}<br>{soft[name]:.3f} to {soft[name]:.3f}"
    difference = soft["alpha_1.7"] - soft["alpha_1"]
    assert cells["alpha 1.7"][place + 1].startswith(f"{difference:+.3f}<br>")
    assert (work / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_finished_runs_of_other_flags_are_not_mixed_in(ablation):
    runs = ablations.Runs(ablations.parse([*command(ablation["work"])[3:], "--max_steps", "5"]))
    with pytest.raises(SystemExit, match="made with --max_steps 2 .*choose another --work_dir"):
        runs.check_same_flags()


def test_without_its_world_no_run_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "MAKE_WORLD", "raise SystemExit('no more disk')")
    flags = ["--seeds", "0", "--settings", "grpo", "--work_dir", str(tmp_path)]
    runs = ablations.Runs(ablations.parse(flags))
    assert runs.make_missing(2) == ["grpo, seed 0"]
    assert "no more disk" in capsys.readouterr().out
    assert not runs.directory("grpo", 0).exists()


def test_the_committed_table_is_that_of_the_committed_numbers():
    out = PROJECT / "benchmarks" / "ablations"
    data = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    assert Path(f"{out}.md").read_text(encoding="utf-8") == ablations.markdown(data, out)
    assert set(data["flags"]["settings"]) == set(ablations.SETTINGS) and not data["missing"]
    assert os.path.getsize(f"{out}.png") > 10_000
