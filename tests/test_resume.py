"""Runs that are killed and go on: bit for bit the run that was never interrupted."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import twgrpo_command
from test_train import metrics, same_run, snapshot, train

import toy
import twgrpo
from files import UserError
from model.policy import Policy
from run import checkpoint, held_out, log
from run.config import parse_config

KILLS = int(os.environ.get("TWGRPO_KILLS", 2))  # CI keeps it short; 10 for the real thing
STEPS = 4 + 4 * KILLS
FLAGS = f"--max_steps {STEPS} --save_steps 2 --learning_rate 1e-3"
AUTO = "--resume_from_checkpoint auto"


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    return train(world, tmp_path_factory.mktemp("whole") / "r", FLAGS)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(whole, world, tmp_path):
    """kill -9 anywhere, and while a checkpoint is written; then --resume_from_checkpoint auto."""
    out, rng = tmp_path / "r", random.Random(0)
    command = twgrpo_command(world, out, *FLAGS.split(), *AUTO.split())
    for kill in range(KILLS):
        before = len(metrics(out)) if (out / "metrics.jsonl").exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < deadline:
            if kill % 2 and list(out.glob(".checkpoint*")):
                break
            if not kill % 2 and (out / "metrics.jsonl").exists() and len(lines(out)) > before:
                time.sleep(rng.random() * 0.2)
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        if newest := checkpoint.find(out, "auto"):
            Policy.load(newest)  # what is there is whole
            done = int(newest.name.rpartition("-")[2])
            assert len(lines(out)) - done <= 2 + 1  # no more than --save_steps are lost
    assert same_run(train(world, out, FLAGS, AUTO), whole, STEPS)


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
    command = twgrpo_command(world, out, *FLAGS.split(), *AUTO.split(), *flags)
    return parse_config(command[2:])


def test_changed_settings_are_said(world, copy, capsys):
    flags = "--learning_rate 0.5 --alpha 3 --per_device_train_batch_size 1"
    more = f"--gradient_accumulation_steps 2 --max_steps {STEPS + 1}"
    checkpoint.to_resume(resuming(world, copy, *flags.split(), *more.split()), copy)
    said = capsys.readouterr().out
    for line in (
        "learning_rate was 0.001, is now 0.5\n",
        "alpha was 1.7, is now 3.0\n",
        "accumulation_steps was 1, is now 2\n",
        "per_device_train_batch_size was 2, is",
        f"max_steps was {STEPS}, is now {STEPS + 1}: the learning rate now",
    ):
        assert f"changed after step {STEPS}: " in said and line in said
    assert said.count("changed after") == 5


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--seed 9", "seed was 42, is now 9: this would be a new run"),
        ("--per_device_train_batch_size 1", "per_device_train_batch_size was 2, is now 1"),
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
    train(world, copy, FLAGS, AUTO, f"--learning_rate 0.5 --max_steps {STEPS + 1}")
    config = json.loads((copy / "config.json").read_text())
    before = {"until_step": STEPS, "learning_rate": 1e-3, "max_steps": STEPS}
    assert config["history"] == [before] and config["learning_rate"] == 0.5
    assert [row["step"] for row in metrics(copy)] == list(range(1, STEPS + 2))
    assert (kept / "trainer_state" / "counters.json").exists()
    assert (copy / "checkpoint-best" / "trainer_state" / "counters.json").exists()
    assert not (newest / "trainer_state").exists() and (newest / "model.safetensors").exists()


def test_a_finished_run_does_only_what_is_missing(world, tmp_path):
    flags = ("--max_steps 1 --eval_jsonl_path", world / "test.jsonl")
    run = shutil.copytree(train(world, tmp_path / "r", *flags), tmp_path / "copy")
    measures = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps({"before": measures["before"]}))
    (run / "curves.png").unlink()
    logs = [(run / f"{n}.jsonl").read_bytes() for n in ("metrics", "completions")]
    saved = snapshot(run / "checkpoint-1")
    train(world, run, *flags, AUTO)
    assert json.loads((run / "eval.json").read_text()) == measures
    assert (run / "curves.png").exists() and snapshot(run / "checkpoint-1") == saved
    assert [(run / f"{n}.jsonl").read_bytes() for n in ("metrics", "completions")] == logs


def test_auto_never_starts_over_where_a_trainer_state_is_missing(world, copy):
    cfg = resuming(world, copy)
    shutil.rmtree(copy / f"checkpoint-{STEPS}" / "trainer_state")
    before = snapshot(copy)
    with pytest.raises(UserError, match="holds no trainer_state .* --model_name_or_path"):
        checkpoint.to_resume(cfg, copy)
    assert snapshot(copy) == before


def test_a_later_checkpoint_is_never_overwritten(world, copy):
    shutil.copytree(copy / f"checkpoint-{STEPS}" / "trainer_state", copy / "old" / "trainer_state")
    counters = copy / "old" / "trainer_state" / "counters.json"
    counters.write_text(counters.read_text().replace(f'"step": {STEPS}', '"step": 2'))
    cfg = resuming(world, copy, "--resume_from_checkpoint", str(copy / "old"))
    with pytest.raises(UserError, match="is later than .*old, and would be overwritten"):
        checkpoint.to_resume(cfg, copy)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"step": "4"}'])
def test_damaged_counters_are_one_sentence(text, world, copy):
    (copy / f"checkpoint-{STEPS}" / "trainer_state" / "counters.json").write_text(text)
    before = snapshot(copy)
    with pytest.raises(UserError, match="counters.json"):
        checkpoint.to_resume(resuming(world, copy), copy)
    assert snapshot(copy) == before


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_damaged_trainer_state_is_one_sentence(name, policy, copy):
    path = copy / f"checkpoint-{STEPS}" / "trainer_state" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="its trainer_state does not fit") as error:
        optimizer = torch.optim.AdamW(policy.model.parameters())
        checkpoint.load(path.parent.parent, policy, optimizer)
    assert "\n" not in str(error.value)


def test_a_model_of_another_shape_does_not_resume(policy, whole):
    wide = Policy(toy.build_model(policy.tokenizer, hidden_size=64), policy.tokenizer, "")
    with pytest.raises(UserError, match="does not fit this model"):
        optimizer = torch.optim.AdamW(wide.model.parameters())
        checkpoint.load(whole / f"checkpoint-{STEPS}", wide, optimizer)


@pytest.mark.parametrize("text", ["", "[]"])
def test_a_damaged_eval_json_is_one_sentence(text, tmp_path):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(UserError, match="eval.json .*remove it"):
        held_out.Measures(tmp_path, resumed=True)


# ------------------------------------------------------------------------------ errors in the loop


def error(*_):
    raise ValueError("a fault")


def nan_in_a_clip(policy, questions, *_):
    questions[0].patches.fill_(float("nan"))


def nan_in_the_weights(policy, *_):
    policy.model.lm_head.weight.data.fill_(float("nan"))


@pytest.mark.parametrize(
    "fault, name, call, flags, kept",
    [
        (error, "sample_groups", 4, "", 3),
        (error, "optimizer_step", 4, "", 3),
        (error, "optimizer_step", 8, "--num_iterations 2", 2),
        (nan_in_a_clip, "sample_groups", 4, "", 3),
        (nan_in_the_weights, "sample_groups", 4, "", 2),
    ],
)
def test_an_error_in_the_loop_saves_the_steps_before_it(
    fault, name, call, flags, kept, whole, world, tmp_path, monkeypatch, capsys
):
    """All in step 4. Nothing is saved after one of its two updates, because the weights are those
    of no step, or if they are NaN: they would replace the last state that can be resumed."""
    calls, function, out = itertools.count(1), getattr(twgrpo, name), tmp_path / "r"

    def faulty(cfg, *arguments):
        if next(calls) == call:
            fault(*arguments)
        return function(cfg, *arguments)

    said = "a fault" if fault is error else r"logits were not finite on question\(s\)"
    with monkeypatch.context() as patch, pytest.raises((ValueError, UserError), match=said):
        patch.setattr(twgrpo, name, faulty)
        train(world, out, FLAGS, flags)
    stopped = f"stopped after step 3; {out}/checkpoint-{kept} holds the run so far"
    assert stopped in capsys.readouterr().err
    assert checkpoint.find(out, "auto").name == f"checkpoint-{kept}"
    if not flags:
        copy = shutil.copytree(out, tmp_path / "copy")  # this process still holds the lock
        assert same_run(train(world, copy, FLAGS, AUTO), whole, STEPS)


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
    with pytest.raises(UserError, match="checkpoint-4 could not be written"):
        train(world, small_disk / "r", FLAGS)
    newest = checkpoint.find(small_disk / "r", "auto")
    assert newest.name == "checkpoint-2" and not list((small_disk / "r").glob(".*partial"))
    Policy.load(newest)


def test_a_read_only_directory_is_an_error_and_what_it_holds_stays(small_disk, world):
    """Root may write where permissions say no, so the file system itself is read-only here."""
    run = small_disk / "r"
    run.mkdir()
    (run / "config.json").write_text("{}")
    before = snapshot(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for flags in (AUTO, f"--output_dir {small_disk / 'new'}"):
        with pytest.raises(UserError, match="cannot be written: Read-only file system"):
            train(world, run, flags)
    assert snapshot(small_disk) == before


def test_save_only_model_leaves_no_trainer_state(world, tmp_path):
    run = train(world, tmp_path / "r", "--save_only_model true --max_steps 1")
    assert (run / "checkpoint-1" / "model.safetensors").exists()
    assert not list(run.rglob("trainer_state"))


@pytest.mark.parametrize(
    "good, steps, reason",
    [(1, 40, "more than --max_skip_fraction 0.05 allows"), (0, 2, "none of 4 clips could be read")],
)
def test_too_many_unreadable_clips_end_the_run_with_a_checkpoint(
    good, steps, reason, world, tmp_path
):
    """Also in a short run that has trained on none."""
    row = '{"problem": "?", "solution": "A", "video": "%s"}\n'
    rows = good * (row % "clips/train_000.mp4") + 7 * (row % "missing.mp4")
    (tmp_path / "q.jsonl").write_text(rows)
    with pytest.raises(UserError, match=f"{reason}; .* holds the"):
        train(world, tmp_path / "r", f"--max_steps {steps} --jsonl_path", tmp_path / "q.jsonl")
    assert list((tmp_path / "r").glob("checkpoint-*/trainer_state"))


@pytest.mark.slow
def test_workers_ahead_change_nothing(whole, world, tmp_path):
    assert same_run(train(world, tmp_path / "r", FLAGS, "--dataloader_num_workers 2"), whole, STEPS)


def test_dry_run_shows_the_plan_and_touches_nothing(world, tmp_path, capsys):
    assert train(world, tmp_path / "r", "--dry_run true") is None
    shown = capsys.readouterr().out
    for words in (
        "<|video_pad|>",
        "4 frames x 56 x 56 pixels, 0.58 s apart = 8 video tokens",
        "= during the rollout",
        "passes over 24 questions",
    ):
        assert words in shown
    assert not list((tmp_path / "r").glob("*"))


def test_dry_run_names_what_is_wrong(world, tmp_path, capsys):
    (tmp_path / "q.json").write_text('[{"problem": "?", "solution": "A", "video": "no.mp4"}]')
    with pytest.raises(UserError, match="none of the first"):
        train(world, tmp_path / "r", "--dry_run true --jsonl_path", tmp_path / "q.json")
    assert "no.mp4: no such video file" in capsys.readouterr().out
