"""Answering benchmarks and single questions; scores and logs are in test_score.py."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT, twgrpo_command
from test_policy import as_qwen2_vl

import eval as evaluation
import twgrpo
from data import STYLES
from files import UserError
from model import ranks
from model.policy import NonFiniteLogits, Policy
from model.rollout import sample as sample_tokens
from rewards import number
from run import answers, decoder, held_out
from run.config import Config
from tools import score


@pytest.fixture(scope="module")
def reader():
    with decoder.ClipReader() as reader:
        yield reader


@pytest.fixture(autouse=True)
def one_reader(reader, monkeypatch):
    """One decoding process for all runs here: starting it takes longer than decoding."""
    monkeypatch.setattr(evaluation, "ClipReader", lambda _: contextlib.nullcontext(reader))


# --------------------------------------------------------------------------------------------- run

SMALL = "--max_frames 4 --min_pixels 3136 --max_pixels 3136 --max_completion_length 20".split()


def run_flags(world, out, *more):
    paths = ["--model", world / "model", "--data", world / "train.jsonl"]
    paths += ["--video_root", world, "--out", out]
    flags = ["run", "--benchmark", "clevrer", *paths, *SMALL, *more]
    return [str(flag) for flag in flags]


def eval_py(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    evaluation.main()


def refused(monkeypatch, capsys, flags) -> str:
    """What a command that ends with an error says."""
    with pytest.raises(SystemExit) as ending:
        eval_py(monkeypatch, flags)
    assert ending.value.code
    return f"{ending.value.code}{capsys.readouterr().err}"


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_of(path):
    return {r["question"]["id"]: r["model_output"] for r in read_rows(path)}


def test_a_run_writes_one_row_a_question_in_the_official_form(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "log.jsonl"
    eval_py(monkeypatch, run_flags(world, out, "--prompt", "think", "--limit", "12"))
    rows, records = read_rows(out), read_rows(world / "train.jsonl")
    assert [r["question"] for r in rows] == records[:12]
    official = "question ground_truth model_output extracted_answer think_content accuracy_score"
    assert list(rows[0])[:7] == [*official.split(), "format_score"]
    assert rows[0]["video_grid"] == [2, 4, 4]
    summary = score.summarize(score.read_log(out))
    assert summary.disagreements == 0 and summary.shares["overall"].questions == 12
    assert f"{summary.shares['overall'].strict:6.2f} [" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_killed_at_any_point_goes_on_where_it_stopped(world, tmp_path, monkeypatch):
    """kill -9 in the middle, then a torn line as a power cut leaves it; nothing twice, nothing
    lost, and the answers are those of a run that was never stopped."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    eval_py(monkeypatch, run_flags(world, whole, "--batch_size", "5"))
    command = [sys.executable, PROJECT / "eval.py", *run_flags(world, out, "--batch_size", "1")]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, **quiet)
    deadline = time.time() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3) and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = len(read_rows(out))
    assert 3 <= written < 24
    with open(out, "ab") as file:
        file.write(b'{"question": {"id": "train-2')
    first = out.read_bytes().split(b"\n")[:written]
    eval_py(monkeypatch, run_flags(world, out, "--batch_size", "7"))
    assert out.read_bytes().split(b"\n")[:written] == first  # what stood there was not touched
    assert len(read_rows(out)) == 24 and answers_of(out) == answers_of(whole)


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_split_the_questions_into_one_log(world, tmp_path, monkeypatch):
    """No question twice, none left out, and the answers are those of one process, even sampled: a
    question's random stream does not depend on its rank. Both ranks see that a log is in use."""
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    sampled = ("--temperature", "1.0", "--batch_size", "4")
    eval_py(monkeypatch, run_flags(world, alone, *sampled))
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    command = [sys.executable, *launch, PROJECT / "eval.py", *run_flags(world, shared, *sampled)]

    def run_two() -> subprocess.CompletedProcess:
        how = dict(capture_output=True, text=True, timeout=120)
        return subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, **how)

    with score.open_log(str(shared), {}):
        refused = run_two()
    assert refused.returncode == 1 and shared.read_text() == ""
    assert "shared.jsonl: another eval.py run is writing to it" in refused.stderr
    done = run_two()
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_rows(shared)) == 24 and answers_of(shared) == answers_of(alone)
    assert "24 questions answered, 0 skipped\nshared.jsonl: 24 questions" in done.stdout


def test_logits_that_are_not_finite_end_a_run_by_name(
    world, policy, questions, tmp_path, monkeypatch, capsys
):
    features = policy.encode_videos(questions)
    features[1] = features[1] * torch.nan
    with pytest.raises(NonFiniteLogits, match=r"question\(s\) train-1;"):
        policy.rollout(questions, features, 2, 4, 1.0, [(0,), (1,), (2,)])
    policy.model.lm_head.weight.data[7, 3] = torch.nan
    monkeypatch.setattr(evaluation, "load_policy", lambda args: policy)
    flags = run_flags(world, tmp_path / "log.jsonl", "--limit", "2")
    for more in ([], ["--temperature", "1"], ["--temperature", "1", "--top_p", "0.5"]):
        message = refused(monkeypatch, capsys, flags + more)
        assert (
            "error: the model's logits were not finite on question(s) train-0, train-1" in message
        )
        assert (tmp_path / "log.jsonl").read_text() == ""


def test_half_a_character_in_a_field_nobody_reads_is_kept(world, tmp_path, monkeypatch, capsys):
    row_ = read_rows(world / "train.jsonl")[0] | {"note": "\ud800", "id": "\udfff\x1b[2J"}
    (tmp_path / "q.json").write_text(json.dumps([row_]))
    flags = run_flags(world, tmp_path / "log.jsonl", "--data", tmp_path / "q.json")
    eval_py(monkeypatch, flags)
    eval_py(monkeypatch, flags)
    assert [r["question"] for r in read_rows(tmp_path / "log.jsonl")] == [row_]
    assert "1 of 1 answered before" in capsys.readouterr().out


def test_unreadable_clips_are_skipped_counted_and_tried_again(world, tmp_path, monkeypatch, capfd):
    rows = read_rows(world / "train.jsonl")[:4]
    rows[3]["problem"] = "What is <|video_pad|><|im_end|>?"  # text, like any other
    (tmp_path / "clips").mkdir()
    for row_ in (*rows[:2], rows[3]):
        (tmp_path / row_["video"]).write_bytes((world / row_["video"]).read_bytes())
    (tmp_path / rows[1]["video"]).write_bytes(b"no video")
    (tmp_path / "q.json").write_text(json.dumps(rows))
    out = tmp_path / "log.jsonl"
    places = ("--data", tmp_path / "q.json", "--video_root", tmp_path)
    eval_py(monkeypatch, run_flags(world, out, *places))
    text, errors = capfd.readouterr()
    assert "2 questions answered, 2 skipped" in text
    assert "skipped question train-1: " in errors and "train_002.mp4: no such video" in errors
    (tmp_path / rows[2]["video"]).write_bytes((world / rows[2]["video"]).read_bytes())
    eval_py(monkeypatch, run_flags(world, out, *places))
    assert "1 questions answered, 1 skipped" in capfd.readouterr().out
    assert set(answers_of(out)) == {"train-0", "train-2", "train-3"}
    (tmp_path / "q.json").write_text(json.dumps(rows[1:2]))
    with pytest.raises(SystemExit, match="none of its 1 questions has a readable clip"):
        eval_py(monkeypatch, run_flags(world, tmp_path / "other.jsonl", *places))


def test_held_out_questions_are_shown_the_clip_of_another_as_a_control(
    world, policy, prompter, records
):
    shown = []

    def spy(record, clip_of):
        shown.append((record.id, clip_of.id))
        return prompter(record, clip_of)

    cfg = Config(str(world / "model"), "-", max_completion_length=4, num_generations=2)
    for wrong_video in (True, False):
        held_out.evaluate(cfg, policy, spy, records[:5], wrong_video=wrong_video, batch_size=2)
        asked, clips = zip(*shown, strict=True)
        assert sorted(asked) == sorted(clips) == sorted(r.id for r in records[:5])
        assert all((a != b) == wrong_video for a, b in shown)
        shown.clear()


def test_out_of_memory_halves_the_batch_and_loses_nothing(capfd):
    sizes = []

    def generate(batch, most=3):
        sizes.append(len(batch))
        if len(batch) > most:
            raise RuntimeError("CUDA error: out of memory")
        return [str(k) for k in batch]

    groups = answers.in_batches(range(1, 21), generate, 16)
    assert list(groups) == [str(k) for k in range(1, 21)]
    assert sizes[:4] == [16, 8, 4, 2] and set(sizes[4:]) == {2}
    assert "out of memory: 8 questions at a time" in capfd.readouterr().err
    with pytest.raises(UserError, match="one question alone .* lower --max_pixels"):
        list(answers.in_batches([1, 2, 3], lambda batch: generate(batch, most=0), 2))
    with pytest.raises(RuntimeError, match="another"):
        list(
            answers.in_batches([1], lambda batch: (_ for _ in ()).throw(RuntimeError("another")), 1)
        )


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("--temperature", "inf", "must be at least 0.0, and finite"),
        ("--top_p", "nan", "must be in"),
        ("--limit", "0", "must be at least 1"),
        ("--max_frames", "9" * 30, "must be in 2..9,999"),
        ("--max_completion_length", "9" * 5000, "invalid"),
        ("--batch_size", "0", "must be at least 1"),
        ("--min_pixels", "3137", "must not be above --max_pixels"),
        ("--repeat_frames", "3", "must be an even number"),
        ("--max_prompt_length", "60", "24 question(s) that cannot become a prompt"),
        ("--model", "/nowhere/at/all", "no such model directory"),
        ("--data", "/nowhere.json", "no such file"),
        ("--out", "/nowhere/log.jsonl", "--out /nowhere/log.jsonl: No such file or directory"),
    ],
)
def test_flags_of_run_that_make_no_sense(
    name, value, sentence, world, tmp_path, monkeypatch, capsys
):
    flags = run_flags(world, tmp_path / "log.jsonl", name, value)
    assert sentence in refused(monkeypatch, capsys, flags)


def test_official_decoding_is_greedy_in_all_but_name(policy, questions):
    """temperature 0.1 with top_p 0.001 leaves the likeliest word alone."""
    features, seeds = policy.encode_videos(questions), [(0,), (1,), (2,)]
    greedy = policy.rollout(questions, features, 1, 12, 0.0, seeds)
    official = policy.rollout(questions, features, 1, 12, 0.1, seeds, top_p=0.001)
    warm = policy.rollout(questions, features, 1, 12, 1.0, seeds)
    assert [g.texts for g in greedy] == [g.texts for g in official] != [g.texts for g in warm]


def test_top_p_keeps_the_likeliest_words_that_hold_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]].expand(4000, -1)
    uniform = torch.from_numpy(np.random.default_rng(0).random(4000))
    banned = torch.zeros(4, dtype=torch.bool)
    for top_p, kept in ((0.4, {1}), (0.6, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})):
        tokens, _ = sample_tokens(logits, 1.0, uniform, banned, top_p)
        assert set(tokens.tolist()) == kept
    tokens, _ = sample_tokens(logits, 1.0, uniform, banned, 0.6)
    assert abs((tokens == 1).float().mean() - 0.5 / 0.8) < 0.03  # renormalised


@pytest.mark.slow
def test_mmvu_rows_about_a_real_clip_run_end_to_end(world, sample, tmp_path, monkeypatch, capsys):
    """Real rows, each path holding the one real clip at hand."""
    rows = json.loads(sample("mmvu_head.json").read_text())[::4]
    clip = sample("mmvu_mechanics_8.mp4")
    for r in rows:
        path = tmp_path / r["video"].lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip.read_bytes())
    out = tmp_path / "log.jsonl"
    (tmp_path / "mmvu.json").write_text(json.dumps(rows))
    flags = ("--benchmark", "mmvu", "--data", tmp_path / "mmvu.json", "--video_root", tmp_path)
    eval_py(monkeypatch, run_flags(world, out, *flags))
    assert len(read_rows(out)) == 15 and read_rows(out)[0]["run"]["prompt"] == "video_r1"
    assert "15 questions answered, 0 skipped" in capsys.readouterr().out


# --------------------------------------------------------------------------- counting with Qwen2-VL


@pytest.mark.slow
def test_counting_trains_and_evaluates_with_qwen2_vl(world, policy, tmp_path, monkeypatch):
    """DVD-counting's form, integer answers, --reward_funcs accuracy format, on a tiny Qwen2-VL: the
    right number earns its reward in training, and the log of the trained model can be scored."""
    base = as_qwen2_vl(policy)
    base.save(tmp_path / "qwen2_vl")
    clips = sorted((world / "clips").glob("train_*.mp4"))[:4]
    rows = [
        dict(
            problem="How many?",
            solution=f"<answer> {k} </answer>",
            video_filename=f"clips/{c.name}",
        )
        for k, c in enumerate(clips)
    ]
    data = tmp_path / "dvd.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in rows))
    monkeypatch.setattr(ranks.StopSignal, "__init__", lambda self: setattr(self, "requested", 0))
    prompts, render = [], twgrpo.Prompter.render
    monkeypatch.setattr(
        twgrpo.Prompter, "render", lambda self, r: prompts.append(render(self, r)) or prompts[-1]
    )
    texts = iter(["<think>a</think><answer>0</answer>", "<answer>1</answer>"] * 999)
    monkeypatch.setattr("model.policy.Policy.decode", lambda self, completion: next(texts))
    flags = ["--model_name_or_path", tmp_path / "qwen2_vl", "--jsonl_path", data]
    flags += ["--num_generations", "2", "--reward_funcs", "accuracy", "format"]
    command = twgrpo_command(world, tmp_path / "run", *flags)
    directory = twgrpo.train_and_evaluate(twgrpo.parse_config(command[2:]))
    assert all("final answer (number) in <answer>" in prompt for prompt in prompts)
    metrics = read_rows(directory / "metrics.jsonl")
    rewards = [m["rewards/accuracy"] for m in metrics]  # solutions 0 and 1 are said half the time
    assert sum(rewards) == pytest.approx(0.5) and all(m["rewards/format"] == 0.5 for m in metrics)
    assert all(np.isfinite(m["loss"]) and m["grad_norm"] > 0 for m in metrics)

    out = tmp_path / "dvd.log.jsonl"
    flags = ("--benchmark", "dvd", "--model", directory / "checkpoint-2", "--data", data)
    eval_py(monkeypatch, run_flags(world, out, *flags))
    log = score.read_log(out)
    assert len(log.answers) == 4 and all(number(a.answer) is not None for a in log.answers)
    assert score.summarize(log).shares["overall"].strict == 50.0


# ------------------------------------------------------------------------------------ score and ask


def test_score_prints_a_report_or_a_table(sample, monkeypatch, capsys):
    log = sample("mmvu_twgrpo_eval.jsonl")
    eval_py(monkeypatch, ["score", log, log])
    assert capsys.readouterr().out.count("mmvu_twgrpo_eval.jsonl: 625 questions") == 2
    eval_py(monkeypatch, ["score", log, "--markdown"])
    assert "| mmvu_twgrpo_eval | 625 | 65.76 |" in capsys.readouterr().out


def test_ask_answers_on_the_terminal(world, monkeypatch, capsys):
    clip = world / "clips" / "train_000.mp4"
    flags = ["ask", "--model", world / "model", "--video", clip, "--question", "Which colours?"]
    flags += ["--options", "red", "blue", "green", *SMALL, "--weights", "--num_generations", "3"]
    eval_py(monkeypatch, flags)
    out = capsys.readouterr().out
    assert out.startswith(
        "4 frames of 56 x 56 pixels, 0.58 s apart: 8 video tokens in a prompt of "
    )
    assert " tokens" in out and "tokens of the 3 answers" in out and "\x1b" not in out
    weights = [line.split() for line in out[out.index("w_t") :].splitlines()[1:]]
    assert weights[0][:2] == ["0", "1.000"]  # the first position shares one prompt row
    assert max(float(w[1]) for w in weights) == pytest.approx(1.7, abs=1e-3)
    assert all(line.count(" | ") == 2 for line in out[out.index("w_t") :].splitlines()[1:])


def test_the_think_part_is_dimmed_and_nothing_else_obeyed():
    text = "<think>so\x1b[2J</think><answer>A</answer>"
    dim = "\x1b[2m<think>so [2J</think>\x1b[0m<answer>A</answer>"
    assert evaluation.dimmed_think(text, colours=True) == dim
    assert evaluation.dimmed_think(text, colours=False) == text.replace("\x1b", " ")
    assert "\x1b[0m" in evaluation.dimmed_think("<think>cut off", colours=True)


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("--alpha", "inf", "argument --alpha: must be at least 1.0, and finite"),
        ("--num_generations", "999999999", "argument --num_generations: must be in 2..1,024"),
        ("--question", "\udcff", "error: --question and --options must be UTF-8 text"),
        ("--video", "/nowhere.mp4", "nowhere.mp4: no such video file"),
    ],
)
def test_flags_of_ask_that_make_no_sense(name, value, sentence, world, monkeypatch, capsys):
    flags = ["ask", "--model", world / "model", "--video", "-", "--question", "?", name, value]
    assert sentence in refused(monkeypatch, capsys, flags)


# ------------------------------------------------------------------ checkpoints that cannot be used


@pytest.fixture
def checkpoint(world, tmp_path):
    """change(file, **values): a copy of the toy's checkpoint with other values in one JSON file."""

    def change(name: str, **values) -> Path:
        shutil.copytree(world / "model", tmp_path / "model", dirs_exist_ok=True)
        path = tmp_path / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return tmp_path / "model"

    return change


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_that_a_checkpoint_brings_along_never_runs(name, checkpoint, tmp_path, monkeypatch):
    """transformers would ask on the terminal whether to run it, or run it if the answer is yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", "evil.T"]}
    kind = {"model_type": "evil"} if name == "config.json" else {"tokenizer_class": "T"}
    directory = checkpoint(name, auto_map=code, **kind)
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with contextlib.suppress(UserError):
        Policy.load(directory)
    assert not (tmp_path / "ran").exists()
    if name == "config.json":
        with pytest.raises(UserError, match="is a 'evil' model; qwen2_5_vl or .* is needed"):
            Policy.load(directory)


@pytest.mark.parametrize("end", ["<|im_end|>", ["<|im_end|>"], [0, 10**9], -1])
def test_end_tokens_that_are_no_ids_are_named(end, checkpoint):
    with pytest.raises(UserError, match="its end token .* is no id of its vocabulary"):
        Policy.load(checkpoint("generation_config.json", eos_token_id=end))
    policy = Policy.load(checkpoint("generation_config.json", eos_token_id=None))
    assert policy.eos_ids.tolist() == [policy.tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"chat_template": 7}'])
def test_a_chat_template_file_that_holds_none_is_named(text, checkpoint):
    directory = checkpoint("generation_config.json")
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(text)
    with pytest.raises(UserError, match="chat template"):
        Policy.load(directory)


# -------------------------------------------------------------------------------------------- docs


def test_every_command_of_the_docs_is_one_the_parsers_take():
    """docs/prompts.md: each line is parsed, and every style of data.py has its row."""
    text = (PROJECT / "docs" / "prompts.md").read_text(encoding="utf-8")
    block = text[text.index("```bash") : text.index("```\n", text.index("```bash") + 9)]
    lines = [line.split("eval.py ", 1)[1] for line in block.splitlines() if "eval.py " in line]
    assert len(lines) >= 9
    for line in lines:
        evaluation.parser().parse_args(line.split())
    for line in (line for line in block.splitlines() if "twgrpo.py " in line):
        twgrpo.parse_config(line.split("twgrpo.py ", 1)[1].split())
    assert all(f"| `{style}` |" in text for style in STYLES)
    flags = set(re.findall(r"`(--[a-z_]+)", text)) - {"--question_type"}  # of twgrpo.py
    assert all(f'"{flag}"' in (PROJECT / "eval.py").read_text() for flag in flags)
