"""The training loop: whole runs on a toy world, what they leave, and what they refuse.

Most runs take place inside this process, because starting another costs seconds; those that are
signalled or locked out are commands.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from conftest import PROJECT, rows_of, run_twgrpo, twgrpo_command
from doc_checks import tables
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig

import files
import toy
import twgrpo
from benchmarks.step import build
from files import UserError
from model.policy import Policy
from records import load_records
from run import checkpoint, clips, plan
from run.config import Config, check_contents, make_output_dir, make_toy, parse_config
from run.log import RunLog
from run.setup import rate
from twgrpo import group_advantages

TIMINGS = ("time/", "tokens_per_second", "peak_memory_gb")


def train(world, out, *flags):
    """A whole run inside this process: its directory."""
    flags = [word for text in flags for word in str(text).split()]
    return twgrpo.train_and_evaluate(parse_config(twgrpo_command(world, out, *flags)[2:]))


def metrics(run):
    rows = rows_of(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in rows]


def weights(run, step):
    return load_file(run / f"checkpoint-{step}" / "model.safetensors")


def same_run(a, b, step):
    """Equal metrics, but for times, and equal weights, bit for bit."""
    ours, theirs = weights(a, step), weights(b, step)
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    return same and metrics(a) == metrics(b)


def snapshot(directory):
    """Every file and when it was written."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


# ------------------------------------------------------------------------------------ the equations


def test_advantages_by_hand():
    """Rewards 2, 1, 1, 0: mean 1, std (ddof 1) sqrt(2/3). All equal: no advantage."""
    scale = 1 / ((2 / 3) ** 0.5 + 1e-4)
    advantages = group_advantages(torch.tensor([2.0, 1.0, 1.0, 0.0]))
    assert torch.allclose(advantages, torch.tensor([scale, 0, 0, -scale]))
    assert (group_advantages(torch.full((4,), 1.5)) == 0).all()


def test_learning_rate_warms_up_and_decays_to_nothing():
    cfg = Config(learning_rate=1.0, warmup_steps=3, max_steps=8)
    rates = [rate(cfg, step) for step in range(1, 10)]
    warm = [0.25, 0.5 * 7 / 8, 0.75 * 6 / 8]
    assert rates == pytest.approx([*warm, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])


# --------------------------------------------------------------------------------------- whole runs


FIVE_STEPS = "--max_steps 5 --save_steps 3 --learning_rate 1e-3"


@pytest.fixture(scope="module")
def short_run(world, tmp_path_factory):
    """Five steps with two checkpoints, and an evaluation before and after."""
    out = tmp_path_factory.mktemp("runs") / "short"
    return train(world, out, FIVE_STEPS, "--eval_jsonl_path", world / "test.jsonl")


def test_a_run_leaves_a_readable_directory(short_run):
    names = {path.name for path in short_run.iterdir()} - {".lock"}
    files = "config.json metrics.jsonl completions.jsonl curves.png weights.html eval.json"
    assert names == {"checkpoint-3", "checkpoint-5", *files.split()}
    assert (short_run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((short_run / "config.json").read_text())["learning_rate"] == 1e-3
    measures = json.loads((short_run / "eval.json").read_text())
    assert set(measures["after"]) == {"sampled", "greedy", "wrong video", "shuffled frames"}


def test_metrics_are_those_of_the_readme_in_a_line_a_step(short_run):
    rows = rows_of(short_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    (table,) = (t for t in tables(readme) if t.header[0] == "metric")
    names = {name for row in table.rows for name in re.findall(r"`([a-z0-9_/]+)`", row[0])}
    for row in rows:
        assert set(row) == {"step", *names} and 1 <= row["weight_mean"] <= 1.7
        mean, p99, most = (row[f"sampling_logp_difference{end}"] for end in ("", "_p99", "_max"))
        assert 0 < mean < p99 < most < 1e-4 and mean < 1e-5  # one policy, float32
    assert rows[0]["learning_rate"] == 1e-3 and rows[-1]["learning_rate"] == pytest.approx(2e-4)


def test_a_maximum_stays_one_over_questions_and_ranks(tmp_path, monkeypatch):
    log = RunLog(parse_config([]), tmp_path)
    for value in (1.0, 3.0, 2.0):
        log.add(far=value, sampling_logp_difference_max=value)
    other_rank = dict(far=[8.0], sampling_logp_difference_max=[4.0])
    monkeypatch.setattr("model.ranks.gather", lambda mine: [mine, other_rank])
    log.write(1)
    (row,) = metrics(tmp_path)
    assert row["far"] == 14 / 4 and row["sampling_logp_difference_max"] == 4


def test_completions_hold_a_group_with_its_weights(short_run, policy):
    rows = rows_of(short_run / "completions.jsonl")
    assert len(rows) == 5
    for row in rows:
        lengths = [len(c["token_ids"]) for c in row["completions"]]
        assert len(lengths) == 4 and len(row["weights"]) == len(row["divergence"]) == max(lengths)
        assert row["weights"][0] == 1.0  # at t = 0 all rows are the shared prompt row
        for c in row["completions"]:
            assert len(c["logps"]) == len(c["token_ids"]) and max(c["logps"]) <= 0
            assert c["text"] == policy.tokenizer.decode(c["token_ids"], skip_special_tokens=True)
            assert c["tokens"] == [policy.tokenizer.decode(k) for k in c["token_ids"]]
            assert set(c["rewards"]) == {"accuracy", "format"}


def test_checkpoint_loads_in_plain_transformers_and_trains_on(short_run, world, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    AutoTokenizer.from_pretrained(short_run / "checkpoint-5")
    AutoModelForImageTextToText.from_pretrained(short_run / "checkpoint-5")
    saved, start = weights(short_run, 5), load_file(world / "model" / "model.safetensors")
    moved = {name for name in saved if not torch.equal(saved[name], start[name])}
    assert moved and not any("visual" in name for name in moved)  # the frozen tower is bit for bit
    for part in ("lm_head", "embed_tokens"):
        assert any(part in name for name in moved)
    flags = "--save_only_model true --loss_type grpo --reward_funcs origin_accuracy format"
    on = train(world, tmp_path / "on", flags, "--model_name_or_path", short_run / "checkpoint-5")
    assert weights(on, 2).keys() == start.keys() and not list(on.rglob("trainer_state"))
    assert "rewards/origin_accuracy" in metrics(on)[0]


@pytest.mark.slow
def test_the_same_command_gives_the_same_bits(short_run, world, tmp_path):
    """Also in a process of its own, whose progress bar shows reward, length and seconds, and with
    clips that are read ahead."""
    flags = [*FIVE_STEPS.split(), "--dataloader_num_workers", "2"]
    shown = run_twgrpo(world, tmp_path / "again", *flags).stderr
    assert same_run(tmp_path / "again", short_run, 5)
    for words in ("reward=", "completion_length=", "rollout=0.", "score=0."):
        assert words in shown
    train(world, tmp_path / "other", FIVE_STEPS, "--seed 7")
    assert metrics(tmp_path / "other") != metrics(short_run)


def test_groups_that_teach_nothing_are_left_out_of_the_backward_pass(
    policy, questions, monkeypatch
):
    """One of three groups has equal rewards: the gradients are those of all three."""
    cfg = Config(num_generations=4, max_completion_length=6, per_device_train_batch_size=3)
    gradients, rewards = [], iter([[0, 1, 2, 1], [1, 1, 1, 1], [2, 0, 0, 0]] * 2)

    def keep(*_):
        parameters = [p for p in policy.model.parameters() if p.grad is not None]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        policy.model.zero_grad()
        return 0.0, True

    monkeypatch.setattr(twgrpo, "rewards_of", lambda *_: torch.tensor([next(rewards)]).float().T)
    monkeypatch.setattr(twgrpo, "optimizer_step", keep)
    step = (cfg, policy, None, None, questions, [(0, b) for b in range(3)], 0.0)
    groups, (some,) = twgrpo.train_step(*step)
    for cfg.per_device_train_batch_size, sizes in ((1, [1, 1, 1]), (3, [2, 1])):
        assert [len(chunk) for chunk, _ in twgrpo.micro_batches(cfg, groups)] == sizes
    monkeypatch.setattr(twgrpo, "micro_batches", lambda cfg, groups: [(groups, True)])
    _, (every,) = twgrpo.train_step(*step)
    assert [o.loss.requires_grad for o in some.outputs] == [True, False, True]
    assert some.loss == pytest.approx(every.loss, abs=1e-7)
    left_out, all_of_them = gradients  # the largest is about 0.2; a last digit of float32
    assert (left_out - all_of_them).abs().max() < 2e-7 * all_of_them.abs().max()


def test_the_ratio_is_always_to_the_weights_that_sampled(world, tmp_path, monkeypatch):
    """Three iterations: on-policy first, then twice against the log-probs of the first, and some
    tokens are clipped."""
    calls, head = defaultdict(list), twgrpo.tw_grpo_head

    def spy(*args, **options):
        output = head(*args, **options)
        calls[options["shuffle_seed"]].append((options["old_logps_N"], output.logps_N))
        return output

    monkeypatch.setattr(twgrpo, "tw_grpo_head", spy)
    flags = "--num_iterations 3 --learning_rate 5e-2 --max_grad_norm 100"
    rows = metrics(train(world, tmp_path / "r", flags, "--per_device_train_batch_size 4"))
    assert len(calls) == 8 and max(row["clip_ratio"] for row in rows) > 0
    for (old_1, new_1), (old_2, new_2), (old_3, _) in calls.values():
        assert old_1 is None and old_2 is new_1 and old_3 is new_1
        assert not torch.equal(new_1, new_2)


def test_kl_to_the_reference_starts_at_nothing_and_grows(world, tmp_path):
    """Sampling, scoring and the reference model have one temperature."""
    flags = "--beta 0.1 --learning_rate 1e-2 --max_steps 3 --freeze_vision_modules false"
    others = "--divergence textbook --ended_rows exclude --question_type single --temperature 0.7"
    rows = metrics(train(world, tmp_path / "r", flags, others, "--train_samples 5 --fps 1"))
    first, *later = (row["kl"] for row in rows)
    assert abs(first) < 1e-9 and all(kl > 1e-5 for kl in later)
    assert all(row["sampling_logp_difference"] < 1e-5 for row in rows)
    start, trained = load_file(world / "model" / "model.safetensors"), weights(tmp_path / "r", 3)
    assert any(not torch.equal(trained[n], start[n]) for n in start if "visual" in n)


@pytest.mark.slow
def test_real_clevrer_clip_trains_end_to_end(world, sample, tmp_path):
    """A real clip at the recipe's own frames and pixels: 10 frames, 935 video tokens."""
    clip = sample("clevrer_video_12176.mp4")
    problem = "Which will not happen?\nA. The spheres collide\nB. Nothing moves"
    row = dict(problem=problem, solution="<answer>A</answer>", video=clip.name)
    (tmp_path / "clevrer.json").write_text(json.dumps([row]))
    paths = ["--jsonl_path", tmp_path / "clevrer.json", "--video_root", clip.parent]
    recipe = "--max_frames 16 --min_pixels 100352 --max_pixels 153664 --max_steps 2"
    rows = metrics(train(world, tmp_path / "r", *paths, recipe, "--per_device_train_batch_size 1"))
    assert len(rows) == 2 and all(row["skipped"] == 0 for row in rows)
    assert all(row["sampling_logp_difference"] < 1e-5 for row in rows)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.slow
def test_bad_clips_are_skipped_counted_and_never_replaced(world, tmp_path, capsys):
    """A missing and a truncated clip: the rest of every step is sampled exactly as before."""
    rows = rows_of(world / "train.jsonl")
    good = (world / rows[0]["video"]).read_bytes()
    (world / "clips" / "cut.mp4").write_bytes(good[: len(good) // 2])
    rows[0]["video"], rows[1]["video"] = "clips/cut.mp4", "clips/missing.mp4"
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = "--max_steps 12 --seed 3 --learning_rate 1e-12"  # which moves nothing
    bad = train(world, tmp_path / "bad", "--jsonl_path", tmp_path / "bad.jsonl", flags)
    stderr = capsys.readouterr().err
    assert metrics(bad)[-1]["skipped"] == 2  # 12 steps of 2 are one pass over 24
    for reason in ("cut.mp4: cannot be decoded", "missing.mp4: no such video file"):
        assert len(re.findall(f"skipped question .*{reason}", stderr)) == 1
    good = train(world, tmp_path / "good", flags)
    runs = [rows_of(run / "completions.jsonl") for run in (bad, good)]
    texts, expected = (
        {g["id"]: [c["text"] for c in g["completions"]] for g in run} for run in runs
    )
    shared = texts.keys() & expected.keys()
    assert len(shared) >= 9 and not {"train-0", "train-1"} & texts.keys()
    assert all(texts[key] == expected[key] for key in shared)


def test_clips_are_decoded_once_while_there_is_room(world, prompter, records, tmp_path):
    """Eight clips, three epochs: all are kept, or as many as fit; the questions are the same."""
    size = prompter(records[0]).patches.numel()  # bytes of a clip in uint8
    seen, decoded = [], []
    for room in (0.0, 2.5 * size / 1e9, 1.0):
        cfg = parse_config(f"--clip_cache_gb {room} --per_device_train_batch_size 4".split())
        ahead = clips.QuestionsAhead(cfg, records[:8], prompter, RunLog(cfg, tmp_path), 1)
        ahead.reader.load_clip = load = Mock(wraps=ahead.reader.load_clip)
        patches = [q.patches for step in range(1, 7) for q in ahead.take(step)[0]]
        seen.append(torch.stack(patches))
        decoded.append(load.call_count)
        ahead.close()
    assert decoded == [24, 24 - 2 * 2, 8]
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--alpha 0.5", "error: --alpha 0.5 must be in [1, 1e9]"),
        ("--temperature 0", "error: --temperature 0.0 must be in [0.001, 1e9]"),
        ("--epsilon 1", "error: --epsilon 1.0 must be in [0, 1)"),
        ("--seed 99999999999999999999", "must be in [0, 2e9]"),
        ("--weight_decay inf", "error: --weight_decay inf must be in [0, 1e9]"),
        ("--fps nan", "error: --fps nan must be in (0, 1e9]"),
        ("--min_pixels 9000000", "error: --min_pixels must be at most --max_pixels"),
        ("--model_name_or_path x", "error: --model_name_or_path and --jsonl_path go together"),
        ("--video_root x", "error: --eval_jsonl_path and --video_root need --jsonl_path"),
        ("--resume_from_checkpoint auto", "--resume_from_checkpoint needs the --output_dir"),
        ("--reward_funcs format bogus", "invalid choice: 'bogus'"),
        ("--question_type several", "invalid choice: 'several'"),
        ("--no_such_flag 1", "--no_such_flag"),
        ("--output_dir /proc/nowhere", "error: --output_dir /proc/nowhere cannot be written"),
        ("{model} --jsonl_path nowhere.json", "error: nowhere.json: cannot be read"),
        ("{model} --jsonl_path {world}/train.jsonl", "error: ./nowhere: no such model directory"),
    ],
)
def test_errors_are_one_sentence_without_a_traceback(
    flags, reason, world, tmp_path, monkeypatch, capsys
):
    model = f"--model_name_or_path ./nowhere --output_dir {tmp_path}/r"
    monkeypatch.setattr(sys, "argv", ["", *flags.format(model=model, world=world).split()])
    with pytest.raises(SystemExit) as error:
        twgrpo.main()
    assert reason in f"{error.value.code}\n{capsys.readouterr().err}"


def test_rank_without_its_companions_is_a_sentence(world, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="RANK is set .* but not WORLD_SIZE, MASTER_ADDR"):
        train(world, tmp_path / "r")


def running(world, out, *flags):
    """A run without an end that has done two steps."""
    command = twgrpo_command(world, out, "--max_steps", "100000", *flags)
    obey = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # nohup would have it ignored
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, preexec_fn=obey, **pipes)
    deadline = time.monotonic() + 90
    while not ((out / "metrics.jsonl").exists() and len(metrics(out)) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_saves_and_leaves_a_readable_directory(number, world, tmp_path):
    """Which no other process can use until then."""
    out = tmp_path / "r"
    process = running(world, out)
    with pytest.raises(UserError, match="is in use by another process"):
        train(world, out, "--resume_from_checkpoint auto")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and number.name in stderr
    steps = [row["step"] for row in metrics(out)]
    assert steps == list(range(1, len(steps) + 1))
    Policy.load(out / f"checkpoint-{steps[-1]}")
    assert (out / "curves.png").exists() and not list(out.glob(".checkpoint*"))


@pytest.mark.slow
def test_a_run_whose_stderr_is_closed_saves_and_ends(world, tmp_path):
    process = running(world, tmp_path / "r")
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    last = metrics(tmp_path / "r")[-1]["step"]
    assert checkpoint.find(tmp_path / "r", "auto").name == f"checkpoint-{last}"


def test_simultaneous_starts_choose_different_directories(tmp_path):
    with ThreadPoolExecutor(10) as threads:
        chosen = list(threads.map(files.new_directory, [tmp_path / "runs" / "toy"] * 200))
    expected = {"toy", *(f"toy-{k}" for k in range(2, 201))}
    assert sorted(path.name for path in chosen) == sorted(expected)


ENDINGS = """
import atexit, os, sys
from model import ranks
for ending in ("pass", "raise SystemExit('error: a sentence')", "raise SystemExit(3)", "1 / 0"):
    if os.fork() == 0:
        atexit.register(print, "shut down")
        ranks.run_script(lambda: exec(ending))
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
del os.environ["RANK"]
atexit.register(print, "shut down")
ranks.run_script(lambda: None)
"""


@pytest.mark.slow
def test_a_rank_ends_with_the_right_exit_code_and_without_shutdown(monkeypatch):
    """A process of its own shuts down as any other."""
    monkeypatch.setenv("RANK", "0")
    options = dict(cwd=PROJECT, capture_output=True, text=True, timeout=60)
    result = subprocess.run([sys.executable, "-c", ENDINGS], **options)
    assert result.stdout.split("\n") == ["0", "1", "3", "1", "shut down", ""]
    assert "error: a sentence" in result.stderr and "ZeroDivisionError" in result.stderr


# -------------------------------------------------------------------------------------- the toy


def test_toy_defaults_are_flags_and_given_flags_win():
    cfg = parse_config([])
    assert all(getattr(cfg, name) == value for name, value in toy.DEFAULTS.items())
    assert parse_config(["--max_steps", "7"]).max_steps == 7
    assert parse_config("--model_name_or_path m --jsonl_path q".split()).learning_rate == 1e-6


@pytest.mark.parametrize("flags", ["", "--resume_from_checkpoint auto", "--allow_changes true"])
@pytest.mark.parametrize("place", ["", ".."])
def test_a_directory_that_holds_a_run_is_left_alone(place, flags, tmp_path, monkeypatch, capsys):
    """Also under a mistyped name: runs instead of runs/toy. A dry run writes nothing anywhere."""
    run = tmp_path / "runs" / "toy"
    (run / "checkpoint-4" / "trainer_state").mkdir(parents=True)
    for name in (".lock", "config.json"):
        (run / name).write_text("{}")
    before, flags = snapshot(tmp_path), ["--output_dir", str(run / place), *flags.split()]
    with pytest.raises(UserError, match="is not empty; choose another|holds no trainer_state"):
        twgrpo.train_and_evaluate(parse_config(flags))
    monkeypatch.chdir(tmp_path)
    for elsewhere in (flags, []):
        assert twgrpo.train_and_evaluate(parse_config([*elsewhere, "--dry_run", "true"])) is None
        assert "a dry run writes nothing" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def test_a_toy_that_was_killed_while_it_was_made_is_made_again(tmp_path, monkeypatch):
    """The directory still counts as new, so the same command goes on."""
    root, cfg = tmp_path / "r" / "toy", parse_config(["--output_dir", str(tmp_path / "r")])
    small = dict(seed=42, train=20, test=1, steps=1)
    make_output_dir(cfg)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Policy, "save", lambda *_: 1 / 0)
        toy.prepare(root, **small)
    for names in ([".lock", ".toy.partial"], [".lock", "toy"]):
        assert sorted(os.listdir(tmp_path / "r")) == names
        check_contents(cfg, tmp_path / "r")
        toy.prepare(root, **small)
    Policy.load(root / "model")


def test_a_directory_of_the_users_in_the_toys_place_is_refused(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "bear.txt").write_text("mine")
    for flags in ([], ["--allow_changes", "true"]):  # it has no model
        with pytest.raises(FileExistsError, match="is not the world of --toy colours --seed 42"):
            make_toy(parse_config(flags), tmp_path / "toy")
    assert (tmp_path / "toy" / "bear.txt").read_text() == "mine"


def test_toy_questions_have_one_to_four_answers_of_what_is_shown(tmp_path):
    train, test = toy.write_clips(tmp_path, seed=1, train=60, test=4)
    sizes = [r.solution.count(",") + 1 for r in load_records(train, tmp_path)]
    assert set(sizes) >= {1, 2, 3} and max(sizes) <= 4
    assert len(load_records(test, tmp_path)) == 4


def test_the_recipe_in_train_sh_is_made_of_real_flags(monkeypatch):
    """torchrun reads the time that a save may take from torch 2.12 on; 600 s hold 116 GB at 0.2 GB
    a second."""
    script = (PROJECT / "train.sh").read_text()
    command = script[script.index(" twgrpo.py") :].replace("\\\n", " ")
    flags = [word.strip('"') for word in command.split()[1:-1]]
    cfg = parse_config(flags)
    assert (cfg.alpha, cfg.num_generations, cfg.learning_rate) == (1.7, 8, 1e-6)
    assert (cfg.max_grad_norm, cfg.beta, cfg.freeze_vision_modules) == (20.0, 0.0, True)
    exported = re.search(r"export (\w+)=.*:-([0-9]+)", script)
    monkeypatch.setenv(exported[1], exported[2])
    launch = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2)
    assert getattr(launch, "shutdown_timeout", 600) == 600  # older ones always wait 30 s


@pytest.mark.slow
def test_it_learns(tmp_path):
    """A short warm start and 30 steps on 16 questions: the reward rises well above its start.

    With advantages of the opposite sign it falls. The whole default run, whose model learns to see,
    is the README's first command.
    """
    world = tmp_path / "toy"
    toy.prepare(world, seed=0, train=16, test=1, steps=150)
    flags = "--max_steps 30 --learning_rate 1e-3 --per_device_train_batch_size 8"
    run = train(world, tmp_path / "run", flags, "--num_generations 8")
    accuracy = [row["rewards/accuracy"] for row in metrics(run)]
    assert sum(accuracy[-5:]) / 5 > sum(accuracy[:5]) / 5 + 0.15


def test_the_memory_table_in_the_readme_is_what_the_plan_computes(monkeypatch):
    """Qwen2.5-VL-7B's shape without its weights, the recipe's flags, a prompt of 1,100 tokens."""
    (policy, *_), columns = build("7b", 1100, "meta"), []
    for gpus in (2, 1):
        monkeypatch.setattr("model.ranks.world", lambda gpus=gpus: gpus)
        phases = plan.memory(Config(), policy, prompt=1100).values()
        always, *others = (sum(parts.values()) / 1e9 for parts in phases)
        columns.append([always, *others, always + max(others)])
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| GB (1e9 bytes)") :].splitlines()[2:7]
    cells = [re.findall(r"[0-9]+[.][0-9]+", row) for row in table]
    shown = [[float(cell) for cell in row] for row in cells]
    assert shown == [[round(value, 1) for value in row] for row in zip(*columns, strict=True)]
