"""Runs that are killed and go on: bit for bit the run that was never interrupted."""

import itertools
import json
import os
import random
import re
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
from run import checkpoint, held_out
from run.config import parse_config, same

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
        before = lines(out)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < deadline:
            if kill % 2 and list(out.glob(".checkpoint*")):
                break
            if not kill % 2 and lines(out) > before:
                time.sleep(rng.random() * 0.2)
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        if newest := checkpoint.find(out, "auto"):
            Policy.load(newest)  # what is there is whole
            done = int(newest.name.rpartition("-")[2])
            assert lines(out) - done <= 2 + 1  # no more than --save_steps are lost
    assert same_run(train(world, out, FLAGS, AUTO), whole, STEPS)


def lines(out):
    path = out / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


# ------------------------------------------------------------------------------ what a resume does


def state_of(run):
    return run / f"checkpoint-{STEPS}" / "trainer_state"


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the finished run, to be harmed."""
    return shutil.copytree(whole, tmp_path / "copy")


def test_changed_settings_are_said_and_nothing_of_the_run_is_lost(world, copy, tmp_path, capsys):
    """Rows after the checkpoint are moved aside, earlier settings are kept, and so are directories
    whose names only look like checkpoints, and links. The same model has another name."""
    newest, saved = state_of(copy).parent, set(copy.glob("checkpoint-*"))
    assert len(saved) == STEPS // 2 and [*copy.glob("*/trainer_state")] == [state_of(copy)]
    kept = [copy / f"checkpoint-{STEPS}-keep", copy / "checkpoint-best"]
    for directory in kept:
        shutil.copytree(newest, directory)
    (copy / "latest").symlink_to(newest)
    (copy / "checkpoint-1").symlink_to(kept[0])
    (copy / ".checkpoint-9.partial").mkdir()  # of a save that was killed
    (tmp_path / "link").symlink_to(world)
    later = f'{{"step": {STEPS + 1}, "loss": 0}}\n{{"step": {STEPS + 2}, "lo'
    with open(copy / "metrics.jsonl", "a") as file:
        file.write(later)
    earlier, config = dict(until_step=2, alpha=9), copy / "config.json"  # of a run resumed before
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(history=[earlier])))
    flags = f"--learning_rate 0.5 --alpha 3 --max_steps {STEPS + 1}"
    same = "--per_device_train_batch_size 1 --gradient_accumulation_steps 2"
    train(world, copy, FLAGS, AUTO, flags, same, f"--model_name_or_path {tmp_path}/link/model")

    assert re.findall(f"changed after step {STEPS}: (.*)\n", capsys.readouterr().out) == [
        "alpha was 1.7, is now 3.0",
        "learning_rate was 0.001, is now 0.5",
        f"max_steps was {STEPS}, is now {STEPS + 1}: the learning rate now falls to 0 there",
        "per_device_train_batch_size was 2, is now 1",
        "gradient_accumulation_steps was 1, is now 2",
    ]
    config = json.loads(config.read_text())
    before, history = config["history"]
    assert before == earlier
    assert (history["until_step"], history["alpha"], len(history)) == (STEPS, 1.7, 1 + 5)
    assert (config["alpha"], config["learning_rate"]) == (3, 0.5)
    assert (copy / f"metrics.jsonl.after-{STEPS}").read_text() == later
    assert [row["step"] for row in metrics(copy)] == list(range(1, STEPS + 2))
    assert all((directory / "trainer_state" / "counters.json").exists() for directory in kept)
    assert all((path / "model.safetensors").exists() for path in saved)
    assert not state_of(copy).exists() and not list(copy.glob(".*.partial"))


def test_numbers_and_switches_are_not_compared_as_files():
    """os.stat takes them for file descriptors, and on a terminal 0, 1 and 2 are one file."""
    with open(__file__) as one, open(__file__) as other:
        assert not same(one.fileno(), other.fileno())


def without_state(state):
    shutil.rmtree(state)


def with_an_older_state(state):
    counters = (shutil.copytree(state, state.parents[1] / "old" / state.name)) / "counters.json"
    counters.write_text(counters.read_text().replace(f'"step": {STEPS}', '"step": 2'))


def with_counters(text):
    return lambda state: (state / "counters.json").write_text(text)


@pytest.mark.parametrize(
    "harm, flags, said",
    [
        (None, "--seed 9", "seed was 42, is now 9: this would be a new run"),
        (None, "--per_device_train_batch_size 1", "per_device_train_batch_size was 2, is now 1"),
        (None, "--model_name_or_path {copy}/checkpoint-2", "model_name_or_path was"),
        (None, "--jsonl_path {world}/test.jsonl", "jsonl_path was"),
        (None, f"--max_steps {STEPS - 1}", f"--max_steps {STEPS - 1} is below the {STEPS} steps"),
        (None, "--resume_from_checkpoint {copy}/checkpoint-2", "checkpoint-2: holds no"),
        (without_state, "", "holds no trainer_state .* --model_name_or_path"),
        (
            with_an_older_state,
            "--resume_from_checkpoint {copy}/old",
            "is later than .*old",
        ),
        (with_counters(""), "", "counters.json"),
        (with_counters("[1]"), "", "counters.json"),
        (with_counters('{"a": 1}'), "", "counters.json"),
        (with_counters('{"step": "4"}'), "", "counters.json"),
    ],
)
def test_another_run_is_refused_and_nothing_is_written(harm, flags, said, world, copy):
    """Nor is a run that cannot go on: it never starts over, nor replaces a later checkpoint."""
    if harm:
        harm(state_of(copy))
    flags = [*FLAGS.split(), *AUTO.split(), *flags.format(world=world, copy=copy).split()]
    before = snapshot(copy)
    with pytest.raises(UserError, match=said):
        checkpoint.to_resume(parse_config(twgrpo_command(world, copy, *flags)[2:]), copy)
    assert snapshot(copy) == before
    if " was" in said:
        flags += ["--allow_changes", "true"]
        assert checkpoint.to_resume(parse_config(twgrpo_command(world, copy, *flags)[2:]), copy)


def test_a_finished_run_does_only_what_is_missing(world, tmp_path):
    flags = ("--max_steps 1 --eval_jsonl_path", world / "test.jsonl")
    run = shutil.copytree(train(world, tmp_path / "r", *flags), tmp_path / "copy")
    measures = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(measures | {"after_step": 0}))
    (run / "curves.png").unlink()
    logs = [(run / f"{n}.jsonl").read_bytes() for n in ("metrics", "completions")]
    saved = snapshot(run / "checkpoint-1")
    train(world, run, *flags, AUTO)
    assert json.loads((run / "eval.json").read_text()) == measures
    assert (run / "curves.png").exists() and snapshot(run / "checkpoint-1") == saved
    assert [(run / f"{n}.jsonl").read_bytes() for n in ("metrics", "completions")] == logs


@pytest.mark.parametrize("damage", ["__0_0.distcp", ".metadata", "another model"])
def test_a_trainer_state_that_does_not_fit_is_one_sentence(damage, policy, copy):
    if damage == "another model":
        policy = Policy(toy.build_model(policy.tokenizer, hidden_size=64), policy.tokenizer, "")
    else:
        path = state_of(copy) / damage
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    optimizer = torch.optim.AdamW(policy.model.parameters())
    with pytest.raises(UserError, match="its trainer_state does not fit this model") as error:
        checkpoint.load(state_of(copy).parent, policy, optimizer)
    assert "\n" not in str(error.value)


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
        (error, "sample_groups", 1, "", None),
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
    """In step 1 or 4. Nothing is saved after one of two updates of a step, because the weights are
    those of no step, or if they are NaN: they would replace the last state that can be resumed."""
    calls, function, out = itertools.count(1), getattr(twgrpo, name), tmp_path / "r"

    def faulty(cfg, *arguments):
        if next(calls) == call:
            fault(*arguments)
        return function(cfg, *arguments)

    said = "a fault" if fault is error else r"logits were not finite on question\(s\)"
    with monkeypatch.context() as patch, pytest.raises((ValueError, UserError), match=said):
        patch.setattr(twgrpo, name, faulty)
        train(world, out, FLAGS, flags)
    stopped = f"3; {out}/checkpoint-{kept} holds the run so far" if kept else "0; nothing was saved"
    assert f"stopped after step {stopped}" in capsys.readouterr().err
    assert checkpoint.find(out, "auto") == (kept and out / f"checkpoint-{kept}")
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


def test_dry_run_shows_the_plan_and_touches_nothing(world, tmp_path, capsys):
    assert train(world, tmp_path / "r", "--dry_run true") is None
    clip = "4 frames x 56 x 56 pixels, 0.58 s apart = 8 video tokens"
    shown = capsys.readouterr().out
    for words in ("<|video_pad|>", clip, "= during the rollout", "passes over 24 questions"):
        assert words in shown
    (tmp_path / "q.json").write_text('[{"problem": "?", "solution": "A", "video": "no.mp4"}]')
    with pytest.raises(UserError, match="none of the first"):
        train(world, tmp_path / "r", "--dry_run true --jsonl_path", tmp_path / "q.json")
    assert "no.mp4: no such video file" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()
