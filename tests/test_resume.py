"""Runs that are killed and go on: bit for bit the run that was never interrupted."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import PROJECT, run_twgrpo, twgrpo_command
from safetensors.torch import load_file
from test_train import metrics

import files
import toy
from files import UserError
from model.policy import Policy
from run import checkpoint, held_out, log
from run.config import parse_config

KILLS = int(os.environ.get("TWGRPO_KILLS", 2))  # CI keeps it short; 10 for the real thing
STEPS = 4 + 4 * KILLS
FLAGS = f"--max_steps {STEPS} --save_steps 2 --learning_rate 1e-3 --logging_steps 1".split()


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "r"
    result = run_twgrpo(world, out, *FLAGS)
    assert result.returncode == 0, result.stderr[-3000:]
    return out


def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(whole, world, tmp_path):
    """kill -9 anywhere, also while a checkpoint is written, then --resume_from_checkpoint auto."""
    out, rng = tmp_path / "r", random.Random(0)
    command = twgrpo_command(world, out, *FLAGS, "--resume_from_checkpoint", "auto")
    for _ in range(KILLS):
        before = len(metrics(out)) if (out / "metrics.jsonl").exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 90
        saving = rng.random() < 0.5  # half of the kills while a checkpoint is being written
        while process.poll() is None and time.monotonic() < deadline:
            if saving and list(out.glob(".checkpoint*")):
                break
            if not saving and (out / "metrics.jsonl").exists() and len(lines(out)) > before:
                time.sleep(rng.random() * 0.2)
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        newest = checkpoint.find(out, "auto")
        if newest:
            Policy.load(newest)  # what is there is whole
            done = int(newest.name.rpartition("-")[2])
            assert len(lines(out)) - done <= 2 + 1  # no more than --save_steps are lost
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert metrics(out) == metrics(whole)
    ours, theirs = (
        load_file(r / f"checkpoint-{STEPS}" / "model.safetensors") for r in (out, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def lines(out):
    return (out / "metrics.jsonl").read_bytes().splitlines()


def test_only_the_newest_checkpoint_keeps_its_trainer_state(whole):
    assert {p.parent.name for p in whole.glob("checkpoint-*/trainer_state")} == {
        f"checkpoint-{STEPS}"
    }
    assert len(list(whole.glob("checkpoint-*"))) == STEPS // 2
    with pytest.raises(UserError, match="checkpoint-2: holds no trainer_state"):
        checkpoint.find(whole, str(whole / "checkpoint-2"))


def test_rows_after_the_checkpoint_are_moved_aside_not_lost(tmp_path):
    rows = [f'{{"step": {k}, "loss": 0}}\n' for k in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows) + '{"step": 6, "lo')
    log.move_aside_later_rows(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(rows[:3])
    later = (tmp_path / "metrics.jsonl.after-3").read_text()
    assert later == "".join(rows[3:]) + '{"step": 6, "lo'


# ---------------------------------------------------------------------------- what a resume refuses


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the finished run, to be harmed."""
    return shutil.copytree(whole, tmp_path / "copy")


def resuming(world, out, *flags):
    command = twgrpo_command(world, out, *FLAGS, "--resume_from_checkpoint", "auto", *flags)
    return parse_config(command[2:])


def snapshot(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_changed_settings_are_said(world, copy, capsys):
    flags = "--learning_rate 0.5 --alpha 3 --per_device_train_batch_size 1"
    more = f"--gradient_accumulation_steps 2 --max_steps {STEPS + 1}"
    checkpoint.to_resume(resuming(world, copy, *flags.split(), *more.split()), copy)
    said = capsys.readouterr().out
    for line in ("learning_rate was 0.001, is now 0.5\n", "alpha was 1.7, is now 3.0\n",
                 "accumulation_steps was 1, is now 2\n", "per_device_train_batch_size was 2, is",
                 f"max_steps was {STEPS}, is now {STEPS + 1}: the learning rate now"):  # fmt: skip
        assert f"changed after step {STEPS}: " in said and line in said
    assert said.count("changed after") == 5


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--seed 9", "seed was 42, is now 9: that would be another run"),
        ("--num_generations 2", "num_generations was 4, is now 2"),
        ("--per_device_train_batch_size 1", "per_device_train_batch_size was 2, is now 1"),
        ("--train_samples 5 --seed 9", "seed was 42, is now 9"),
        ("--model_name_or_path {copy}/checkpoint-2", "model_name_or_path was"),
        ("--jsonl_path {world}/test.jsonl", "jsonl_path was"),
        (f"--max_steps {STEPS - 1}", f"--max_steps {STEPS - 1} is below the {STEPS} steps"),
    ],
)
def test_another_run_is_refused_and_nothing_is_written(flags, said, world, copy):
    before, flags = snapshot(copy), flags.format(world=world, copy=copy).split()
    with pytest.raises(UserError) as error:
        checkpoint.to_resume(resuming(world, copy, *flags), copy)
    assert said in str(error.value) and snapshot(copy) == before
    if "--max_steps" not in flags:
        assert checkpoint.to_resume(resuming(world, copy, *flags, "--allow_changes", "true"), copy)


def test_the_same_model_under_another_name_is_the_same(world, copy, tmp_path):
    (tmp_path / "link").symlink_to(world)
    flags = ["--model_name_or_path", f"{tmp_path}/link/model"]
    assert checkpoint.to_resume(resuming(world, copy, *flags), copy)


def test_a_resumed_run_keeps_its_history_and_other_directories(world, copy):
    """Also with directories whose names only look like checkpoints, and a link."""
    newest = copy / f"checkpoint-{STEPS}"
    kept = shutil.copytree(newest, copy / f"checkpoint-{STEPS}-keep")
    (copy / "checkpoint-best" / "trainer_state").mkdir(parents=True)
    (copy / "checkpoint-best" / "trainer_state" / "counters.json").write_text("{}")
    (copy / "latest").symlink_to(newest)
    (copy / "checkpoint-1").symlink_to(kept)
    flags = f"--learning_rate 0.5 --max_steps {STEPS + 1} --resume_from_checkpoint auto".split()
    result = run_twgrpo(world, copy, *FLAGS, *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    config = json.loads((copy / "config.json").read_text())
    before = {"until_step": STEPS, "learning_rate": 1e-3, "max_steps": STEPS}
    assert config["history"] == [before] and config["learning_rate"] == 0.5
    assert [row["step"] for row in metrics(copy)] == list(range(1, STEPS + 2))
    assert (kept / "trainer_state" / "counters.json").exists()
    assert (copy / "checkpoint-best" / "trainer_state" / "counters.json").exists()
    assert not (newest / "trainer_state").exists() and (newest / "model.safetensors").exists()


def test_a_finished_run_does_only_what_is_missing(world, tmp_path):
    flags = ["--eval_jsonl_path", str(world / "test.jsonl"), "--max_steps", "1"]
    assert run_twgrpo(world, tmp_path / "r", *flags).returncode == 0
    measures = json.loads((tmp_path / "r" / "eval.json").read_text())
    (tmp_path / "r" / "eval.json").write_text(json.dumps({"before": measures["before"]}))
    (tmp_path / "r" / "curves.png").unlink()
    logs = [(tmp_path / "r" / f"{n}.jsonl").read_bytes() for n in ("metrics", "completions")]
    saved = snapshot(tmp_path / "r" / "checkpoint-1")
    result = run_twgrpo(world, tmp_path / "r", *flags, "--resume_from_checkpoint", "auto")
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "r" / "eval.json").read_text()) == measures
    assert (tmp_path / "r" / "curves.png").exists()
    assert snapshot(tmp_path / "r" / "checkpoint-1") == saved
    after = [(tmp_path / "r" / f"{n}.jsonl").read_bytes() for n in ("metrics", "completions")]
    assert after == logs


def test_auto_never_starts_over_where_checkpoints_were(world, copy):
    cfg = resuming(world, copy)
    shutil.rmtree(copy / f"checkpoint-{STEPS}" / "trainer_state")
    before = snapshot(copy)
    with pytest.raises(UserError, match="holds no trainer_state .* --model_name_or_path"):
        checkpoint.to_resume(cfg, copy)
    assert snapshot(copy) == before
    for path in copy.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match=f"has done {STEPS} steps, but holds no checkpoint"):
        checkpoint.to_resume(cfg, copy)


def test_a_later_checkpoint_is_never_overwritten(world, copy):
    shutil.copytree(copy / f"checkpoint-{STEPS}" / "trainer_state", copy / "old" / "trainer_state")
    counters = copy / "old" / "trainer_state" / "counters.json"
    counters.write_text(counters.read_text().replace(f'"step": {STEPS}', '"step": 2'))
    sums = copy / "old" / "trainer_state" / "checksums.json"
    new = json.loads(sums.read_text()) | {"counters.json": files.checksum(counters)}
    sums.write_text(json.dumps(new))
    cfg = resuming(world, copy, "--resume_from_checkpoint", str(copy / "old"))
    with pytest.raises(UserError, match="is later than .*old, and would be overwritten"):
        checkpoint.to_resume(cfg, copy)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "counters.json", "checksums.json"])
@pytest.mark.parametrize("harm", [flip, cut, os.remove])
def test_a_damaged_trainer_state_is_one_sentence(harm, name, world, copy):
    harm(copy / f"checkpoint-{STEPS}" / "trainer_state" / name)
    before = snapshot(copy)
    with pytest.raises(UserError) as error:
        checkpoint.to_resume(resuming(world, copy), copy)
    assert "\n" not in str(error.value) and snapshot(copy) == before


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"step": "4"}'])
def test_foreign_counters_are_one_sentence(text, world, copy):
    state = copy / f"checkpoint-{STEPS}" / "trainer_state"
    (state / "counters.json").write_text(text)
    sums = json.loads((state / "checksums.json").read_text())
    sums["counters.json"] = files.checksum(state / "counters.json")
    (state / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(UserError, match="counters.json|not of this version"):
        checkpoint.to_resume(resuming(world, copy), copy)


def test_a_model_with_fewer_layers_does_not_resume(policy, whole):
    path = whole / f"checkpoint-{STEPS}"
    checkpoint.check_fits(path, policy)
    small = Policy(toy.build_model(policy.tokenizer, layers=1), policy.tokenizer, "")
    with pytest.raises(UserError, match="belongs to another model"):
        checkpoint.check_fits(path, small)
    with pytest.raises(UserError, match="does not fit this model"):  # torch's own, no Exception
        wide = Policy(toy.build_model(policy.tokenizer, hidden_size=64), policy.tokenizer, "")
        checkpoint.load(path, wide, torch.optim.AdamW(wide.model.parameters()))


@pytest.mark.parametrize("text", ["", "[]", '{"before": 1}', '{"before": {"greedy": {"soft": 1}}}'])
def test_a_damaged_eval_json_is_one_sentence(text, tmp_path):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(UserError, match="eval.json .*remove it"):
        held_out.read_measures(tmp_path / "eval.json")


# ------------------------------------------------------------------------------ errors in the loop


def faulty(world, out, *fault, flags=()):
    command = twgrpo_command(world, out, *FLAGS, "--save_steps", "100", *flags)
    script = PROJECT / "tests" / "faulty_run.py"
    command = [command[0], str(script), *map(str, fault), *command[2:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("fault, kept", [("logits", "checkpoint-3"), ("weights", "checkpoint-2")])
def test_logits_that_are_not_finite_end_the_run(fault, kept, world, tmp_path):
    """After saving the steps before, unless the weights themselves are NaN: those would take the
    place of the last state that can be resumed."""
    out = tmp_path / "r"
    result = faulty(world, out, fault, 0, 4, flags=("--save_steps", "2"))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "logits were not finite on question(s)" in result.stderr
    assert f"stopped after step 3; {out}/{kept} holds the run so far" in result.stderr
    assert checkpoint.find(out, "auto").name == kept


@pytest.mark.parametrize("phase", ["rollout", "backward"])
def test_an_error_in_the_loop_saves_the_steps_before_it(phase, whole, world, tmp_path):
    result = faulty(world, tmp_path / "r", phase, 0, 4)
    assert result.returncode == 1 and f"a fault in the {phase}" in result.stderr
    assert "stopped after step 3; " in result.stderr and "checkpoint-3 holds" in result.stderr
    more = ["--save_steps", "100", "--resume_from_checkpoint", "auto"]
    assert run_twgrpo(world, tmp_path / "r", *FLAGS, *more).returncode == 0
    assert metrics(tmp_path / "r") == metrics(whole)
    name = f"checkpoint-{STEPS}/model.safetensors"
    ours, theirs = load_file(tmp_path / "r" / name), load_file(whole / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_half_a_step_is_never_saved(world, tmp_path):
    """The second of two updates raises: the weights are those of no step."""
    result = faulty(world, tmp_path / "r", "backward2", 0, 4, flags=("--num_iterations", "2"))
    assert result.returncode == 1 and "stopped after step 3; nothing was saved" in result.stderr
    assert not list((tmp_path / "r").glob("*checkpoint-*"))


# --------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB: room for one checkpoint of the toy, not for two."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_an_error_and_the_older_checkpoint_stays(small_disk, world):
    result = run_twgrpo(world, small_disk / "r", *FLAGS)
    assert result.returncode == 1, result.stderr[-3000:]
    assert "checkpoint-4 could not be written" in result.stderr
    assert "Traceback" not in result.stderr
    newest = checkpoint.find(small_disk / "r", "auto")
    assert newest.name == "checkpoint-2" and not list((small_disk / "r").glob(".*partial"))
    Policy.load(newest)


def test_a_read_only_directory_is_an_error_and_what_it_holds_stays(small_disk, world):
    """Root may write where permissions say no, so the file system itself is read-only here."""
    short = ("--save_only_model", "true", "--max_steps", "1")
    assert run_twgrpo(world, small_disk / "r", *short).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in small_disk.rglob("*")}
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for flags in (("--resume_from_checkpoint", "auto"), ("--output_dir", str(small_disk / "new"))):
        result = run_twgrpo(world, small_disk / "r", *flags)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert "cannot be written: Read-only file system" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in small_disk.rglob("*")} == before


def test_save_only_model_leaves_no_trainer_state(world, tmp_path):
    run_twgrpo(world, tmp_path / "r", "--save_only_model", "true")
    assert (tmp_path / "r" / "checkpoint-2" / "model.safetensors").exists()
    assert not list((tmp_path / "r").rglob("trainer_state"))


def test_too_many_unreadable_clips_end_the_run_with_a_checkpoint(world, tmp_path):
    row = '{"problem": "?", "solution": "A", "video": "%s"}\n'
    good = "clips/train_000.mp4"
    (tmp_path / "q.jsonl").write_text(row % good + 7 * (row % "missing.mp4"))
    flags = ["--jsonl_path", str(tmp_path / "q.jsonl"), "--max_steps", "40"]
    result = run_twgrpo(world, tmp_path / "r", *flags)
    assert result.returncode == 1 and "--max_skip_fraction 0.05 allows" in result.stderr
    assert list((tmp_path / "r").glob("checkpoint-*/trainer_state"))


def test_workers_ahead_change_nothing(whole, world, tmp_path):
    result = run_twgrpo(world, tmp_path / "r", *FLAGS, "--dataloader_num_workers", "2")
    assert result.returncode == 0, result.stderr[-3000:]
    assert metrics(tmp_path / "r") == metrics(whole)


def test_dry_run_shows_the_plan_and_touches_nothing(world, tmp_path):
    result = run_twgrpo(world, tmp_path / "r", "--dry_run", "true")
    assert result.returncode == 0, result.stderr[-3000:]
    for words in ("<|video_pad|>", "4 frames x 56 x 56 pixels, 0.58 s apart = 8 video tokens",
                  "= during the rollout", "passes over 24 questions"):  # fmt: skip
        assert words in result.stdout
    assert not list((tmp_path / "r").glob("*"))


def test_dry_run_names_what_is_wrong(world, tmp_path):
    (tmp_path / "q.json").write_text('[{"problem": "?", "solution": "A", "video": "no.mp4"}]')
    flags = ["--jsonl_path", str(tmp_path / "q.json"), "--dry_run", "true"]
    result = run_twgrpo(world, tmp_path / "r", *flags)
    assert result.returncode == 1 and "no.mp4: no such video file" in result.stdout
    assert "error: none of the first" in result.stderr and "Traceback" not in result.stderr
