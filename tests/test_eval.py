"""Answering benchmarks and single questions; scores and logs are in test_score.py."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT, twgrpo_command, wait_until
from test_policy import as_family

import eval as evaluation
import twgrpo
import video
from data import STYLES, Prompter
from files import UserError
from model.policy import Policy
from model.rollout import sample as sample_tokens
from run import answers, held_out
from run.config import Config
from tools import score
from video import Clip, Geometry

SMALL = "--max_frames 4 --min_pixels 3136 --max_pixels 3136 --max_completion_length 20".split()


@pytest.fixture
def eval_py(monkeypatch, capsys):
    """eval_py(*flags): what the command prints, and the sentence it ends with. It decodes in this
    process: starting another takes longer."""

    def run(*flags) -> str:
        monkeypatch.setattr(evaluation, "ClipReader", lambda _: contextlib.nullcontext(video))
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
        ending = ""
        try:
            evaluation.main()
        except SystemExit as error:
            ending = str(error.code)
        printed = capsys.readouterr()
        return printed.out + printed.err + ending

    return run


def run_flags(world, out, *more) -> list[str]:
    """`eval.py run` on the toy's training questions; later flags win."""
    paths = ["--model", world / "model", "--data", world / "train.jsonl", "--video_root", world]
    flags = ["run", "--benchmark", "clevrer", *paths, "--out", out, *SMALL, *more]
    return [str(flag) for flag in flags]


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_of(path) -> dict[str, str]:
    return {r["question"]["id"]: r["model_output"] for r in read_rows(path)}


# --------------------------------------------------------------------------------------------- run


def test_a_run_writes_one_row_a_question_in_the_official_form(world, tmp_path, eval_py):
    records = read_rows(world / "train.jsonl")[:12]
    records[0] |= {"note": "\ud800", "id": "\udfff\x1b[2J"}  # half characters are kept as well
    (tmp_path / "q.json").write_text(json.dumps(records))
    out = tmp_path / "log.jsonl"
    flags = run_flags(world, out, "--prompt", "think", "--data", tmp_path / "q.json")
    printed, rows = eval_py(*flags), read_rows(out)
    assert [r["question"] for r in rows] == records
    official = "question ground_truth model_output extracted_answer think_content accuracy_score"
    assert list(rows[0])[:7] == [*official.split(), "format_score"]
    assert rows[0]["video_grid"] == [2, 4, 4]
    assert score.table([score.read_log(out)]) in printed
    assert "overall |        12 | " in printed and "accuracy_score differs: 0\n" in printed
    assert "log.jsonl: 12 of 12 answered before" in eval_py(*flags)
    assert "line 1 was made with another seed" in eval_py(*flags, "--seed", 1)
    assert len(read_rows(out)) == 12


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_killed_at_any_point_goes_on_where_it_stopped(world, tmp_path, eval_py):
    """kill -9 in the middle, then a torn line as a power cut leaves it; two ranks share the rest.
    Nothing twice, nothing lost, and the answers are those of one process that was never stopped:
    a question's random stream depends neither on its batch nor on its rank."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    eval_py(*run_flags(world, whole, "--temperature", "1", "--batch_size", "5"))
    flags = run_flags(world, out, "--temperature", "1", "--batch_size", "1")
    process = subprocess.Popen([sys.executable, PROJECT / "eval.py", *flags])
    wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3)
    process.kill()
    process.wait()
    first, count = out.read_bytes(), len(read_rows(out))
    assert 3 <= count < 24
    with open(out, "ab") as file:
        file.write(b'{"question": {"id": "train-2')
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    how = dict(capture_output=True, text=True, timeout=120)
    how["env"] = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launch, PROJECT / "eval.py", *flags, "--batch_size", "4"]
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    refused = subprocess.run([*command, "--seed", "1"], **how)  # both ranks, and nothing is written
    assert refused.returncode == 1 and refused.stderr.count("was made with another seed") == 2
    assert out.read_bytes().startswith(first)  # what stood there was not touched
    assert len(read_rows(out)) == 24 and answers_of(out) == answers_of(whole)
    assert f"{24 - count} questions answered, 0 skipped\n" in done.stdout
    assert done.stdout.count("killed.jsonl: format rate") == 1


def test_logits_that_are_not_finite_end_a_run_by_name(
    world, policy, questions, tmp_path, monkeypatch, eval_py
):
    features = policy.encode_videos(questions)
    features[1] = features[1] * torch.nan
    with pytest.raises(UserError, match=r"question\(s\) train-1;"):
        policy.rollout(questions, features, 2, 4, 1.0, [(0,), (1,), (2,)])
    policy.model.lm_head.weight.data[7, 3] = torch.nan
    monkeypatch.setattr(Policy, "load", lambda *_, **__: policy)
    flags = run_flags(world, tmp_path / "log.jsonl", "--limit", "2")
    message = "error: the model's logits were not finite on question(s) train-0, train-1"
    for more in ("", "--temperature 1", "--temperature 1 --top_p 0.5"):
        assert message in eval_py(*flags, *more.split())
        assert (tmp_path / "log.jsonl").read_text() == ""


def test_unreadable_clips_are_skipped_counted_and_tried_again(world, tmp_path, eval_py):
    (tmp_path / "clips").mkdir()
    names = [row["video"] for row in read_rows(world / "train.jsonl")[:3]]
    shutil.copy(world / names[0], tmp_path / names[0])
    (tmp_path / names[1]).write_bytes(b"no video")
    out, places = tmp_path / "log.jsonl", ("--video_root", tmp_path, "--limit", 3)
    flags = run_flags(world, out, "--benchmark", "mmvu", *places)
    printed = eval_py(*flags)
    assert "1 questions answered, 2 skipped" in printed
    assert "skipped question train-1: " in printed and "train_002.mp4: no such video" in printed
    shutil.copy(world / names[2], tmp_path / names[2])
    assert "1 questions answered, 1 skipped" in eval_py(*flags)
    assert set(answers_of(out)) == {"train-0", "train-2"}
    assert {row["run"]["prompt"] for row in read_rows(out)} == {"video_r1"}


@pytest.mark.slow
def test_counting_trains_and_evaluates_with_qwen2_vl(world, policy, tmp_path, monkeypatch, eval_py):
    """DVD-counting's form, integer answers, --reward_funcs accuracy format, on a tiny Qwen2-VL: the
    right number earns its reward in training, and the log of the trained model can be scored."""
    as_family("qwen2_vl", policy).save(tmp_path / "qwen2_vl")
    clip, data = str(world / "clips/train_000.mp4"), tmp_path / "dvd.jsonl"
    row = dict(problem="How many?", video_filename=clip)
    rows = [json.dumps(row | {"solution": f"<answer> {k} </answer>"}) for k in range(4)]
    data.write_text("\n".join(rows))
    texts = iter(["<think>a</think><answer>0</answer>", "<answer>1</answer>"] * 999)

    def said(tokenizer, several, skip_special_tokens=False):
        return [next(texts) if skip_special_tokens else "" for _ in several]

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.batch_decode", said)
    flags = ["--model_name_or_path", tmp_path / "qwen2_vl", "--jsonl_path", data]
    flags += "--video_root / --num_generations 2 --reward_funcs accuracy format".split()
    command = twgrpo_command(world, tmp_path / "run", *flags)
    directory = twgrpo.train_and_evaluate(twgrpo.parse_config(command[2:]))
    metrics = read_rows(directory / "metrics.jsonl")
    # solutions 0 and 1 are said half the time
    assert sum(m["rewards/accuracy"] for m in metrics) == pytest.approx(0.5)
    assert all(m["rewards/format"] == 0.5 for m in metrics)
    assert all(np.isfinite(m["loss"]) and m["grad_norm"] > 0 for m in metrics)

    flags = ["--benchmark", "dvd", "--model", directory / "checkpoint-2", "--data", data]
    eval_py(*run_flags(world, tmp_path / "log.jsonl", *flags, "--video_root", "/"))
    log = score.read_log(tmp_path / "log.jsonl")
    assert np.mean(score.parts(log)["overall"] == 1) == 0.5 and all(a.fits for a in log.answers)


# ------------------------------------------------------------------------- score, ask and bad flags


def test_ask_answers_on_the_terminal_and_score_prints_one_table(world, sample, eval_py):
    flags = ["ask", "--model", world / "model", "--video", world / "clips" / "train_000.mp4"]
    flags += ["--question", "Which colours?", "--options", "red", "blue", *SMALL]
    printed = eval_py(*flags)
    assert re.search(r"^\(\d+ tokens(, cut off)?; prompt \d\d\)$", printed, re.MULTILINE)
    unread = eval_py(*flags, "--video", "/nowhere.mp4")
    assert "nowhere.mp4: no such video file" in unread and unread.endswith("1")
    assert "--options takes at most 26" in eval_py(*flags, "--options", *"x" * 27)
    log = sample("mmvu_twgrpo_eval.jsonl")
    assert eval_py("score", log, log).count("| mmvu_twgrpo_eval | overall ") == 2


@pytest.mark.parametrize(
    "flag, sentence",
    [
        ("--temperature inf", "--temperature inf must be in [0, 1e9]"),
        ("--top_p nan", "--top_p nan must be in (0, 1]"),
        ("--limit 0", "--limit 0 must be in [1, 1e9]"),
        ("--repeat_frames 3", "--repeat_frames must be an even number"),
        ("--max_frames 1", "--max_frames 1 must be in [2, 2e9]"),
        ("--max_prompt_length 60", "24 question(s) that cannot become a prompt"),
        ("--model /nowhere/at/all", "no such model directory"),
        ("--data /nowhere.json", "nowhere.json: cannot be read"),
        ("--video_root /nowhere", "none of its 24 questions has a readable clip"),
        ("--out /nowhere/log.jsonl", "No such file or directory: '/nowhere/log.jsonl'"),
    ],
)
def test_flags_that_make_no_sense(flag, sentence, world, tmp_path, eval_py):
    assert sentence in eval_py(*run_flags(world, tmp_path / "log.jsonl", *flag.split()))


def test_every_command_of_the_docs_is_one_the_parsers_take():
    """docs/prompts.md: each line is parsed, and every style of data.py has its row."""
    text = (PROJECT / "docs" / "prompts.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:python|torchrun).* (eval|twgrpo)\.py (.*)", text, re.M)
    assert len(commands) >= 11 and all(f"| `{style}` |" in text for style in STYLES)
    for program, flags in commands:
        parse = evaluation.parser().parse_args if program == "eval" else twgrpo.parse_config
        parse(flags.split())


# ------------------------------------------------------------------- held-out questions, batches


def test_shuffled_frames_keep_what_a_temporal_patch_shows(tmp_path):
    """Every patch of two frames is there, whole and in another place, in an order of the file's."""
    frames = torch.arange(16).view(16, 1, 1, 1).expand(16, 3, 2, 2)
    prompter = Prompter(None, "", Geometry(), load_clip=lambda path: Clip(frames, 1.0))
    orders = []
    for name in ("a.mp4", "b.mp4", "a.mp4"):
        clip = held_out.shuffled(prompter, seed=3).load_clip(tmp_path / name)
        pairs = clip.frames[:, 0, 0, 0].view(8, 2)
        assert (pairs[:, 1] == pairs[:, 0] + 1).all()
        orders.append(pairs[:, 0].tolist())
        assert all(a != b for a, b in zip(orders[-1], range(0, 16, 2), strict=True))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == list(range(0, 16, 2))


def test_held_out_questions_are_asked_with_other_and_with_shuffled_clips_as_controls(
    world, policy, prompter, records, monkeypatch
):
    own, shown, asked, seeds = [str(r.video) for r in records[:5]], [], [], []
    tokenize = Prompter.tokenize

    def load(path, *settings):
        shown.append(path)
        return video.load_clip(path, *settings)

    def spy(self, record, times):
        asked.append(record)
        return tokenize(self, record, times)

    def shuffled(prompter, seed):
        return dataclasses.replace(prompter, load_clip=lambda *a: seeds.append(seed) or load(*a))

    monkeypatch.setattr(Prompter, "tokenize", spy)
    monkeypatch.setattr(held_out, "shuffled", shuffled)
    prompter = dataclasses.replace(prompter, load_clip=load)
    cfg = Config(str(world / "model"), "-", max_completion_length=4, num_generations=2)
    for variant in ("sampled", "wrong video", "shuffled frames"):
        shown.clear(), asked.clear()
        held_out.evaluate(cfg, policy, prompter, records[:5], variant, batch_size=2)
        others = [a != b for a, b in zip(own, shown, strict=True)]
        assert sorted(shown) == sorted(own) and set(others) == {variant == "wrong video"}
        assert asked == records[:5]
    assert seeds == [cfg.seed] * 5
    gone = dataclasses.replace(records[0], video=Path("gone.mp4"))
    assert held_out.evaluate(cfg, policy, prompter, [gone, records[1]])["skipped"] == 1


def test_without_an_evaluation_at_the_start_only_the_end_is_shown(tmp_path, capsys):
    measures = held_out.Measures(tmp_path, resumed=False)
    measures.rows["after"] = {"sampled": dict(soft=0.5, exact=0.25, format=1.0)}
    measures.print(3)
    assert capsys.readouterr().out.split()[-7:] == "sampled - 0.500 - 0.250 - 1.000".split()


def test_out_of_memory_halves_the_batch_and_loses_nothing(capfd):
    sizes = []

    def generate(batch):
        sizes.append(len(batch))
        if len(batch) > 3 or batch[0] < 0:
            raise RuntimeError("another" if batch[0] == -2 else "CUDA error: out of memory")
        return [str(k) for k in batch]

    assert list(answers.in_batches(range(20), generate, 16)) == [str(k) for k in range(20)]
    assert sizes[:4] == [16, 8, 4, 2] and set(sizes[4:]) == {2}
    assert "out of memory: 8 questions at a time" in capfd.readouterr().err
    with pytest.raises(UserError, match="a single question .* lower --max_pixels"):
        list(answers.in_batches([-1, 2, 3], generate, 2))
    with pytest.raises(RuntimeError, match="another"):
        list(answers.in_batches([-2], generate, 1))


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
    for top_p, kept in ((0.4, {1}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3}), (0.6, {1, 3})):
        tokens, _ = sample_tokens(logits, 1.0, uniform, banned, top_p)
        assert set(tokens.tolist()) == kept
    assert abs((tokens == 1).float().mean() - 0.5 / 0.8) < 0.03  # renormalised


# ------------------------------------------------------------------ checkpoints that cannot be used


@pytest.fixture
def checkpoint(world, tmp_path):
    """change(file, **values): a copy of the toy's checkpoint with other values in one JSON file."""

    def change(name: str, **values) -> Path:
        shutil.copytree(world / "model", tmp_path / "model", dirs_exist_ok=True)
        path = tmp_path / "model" / name
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | values))
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
    with pytest.raises(UserError, match="its end token .* is not in its vocabulary"):
        Policy.load(checkpoint("generation_config.json", eos_token_id=end))


def test_a_missing_end_token_is_the_tokenizers_and_a_missing_chat_template_is_named(checkpoint):
    policy = Policy.load(checkpoint("generation_config.json", eos_token_id=None))
    assert policy.eos_ids.tolist() == [policy.tokenizer.eos_token_id]
    for template in (None, 7):
        directory = checkpoint("chat_template.json", chat_template=template)
        with pytest.raises(UserError, match="has no chat template"):
            Policy.load(directory)
    (directory / "chat_template.json").write_text("{")
    with pytest.raises(UserError, match="it must contain a chat template"):
        Policy.load(directory)
