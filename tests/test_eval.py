"""Benchmarks, the scores of their logs, and one question at a time."""

import contextlib
import json
import multiprocessing
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import PROJECT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_policy import as_qwen2_vl

import eval as evaluation
import loader
import ranks
import scoring
import toy
import twgrpo
from data import STYLES
from policy import ModelError
from records import DataError
from rewards import number
from rollout import sample


@pytest.fixture(scope="module")
def reader():
    with loader.ClipReader() as reader:
        yield reader


@pytest.fixture(autouse=True)
def one_reader(reader, monkeypatch):
    """One decoding process for all runs here: starting it takes longer than what it does."""
    monkeypatch.setattr(evaluation, "ClipReader", lambda _: contextlib.nullcontext(reader))


# ------------------------------------------------------------------------------------------- score


def row(output, truth="A", key=0, **more):
    question = {"problem_id": key, "problem": "?", "video": f"/MVBench/clips/{key}.mp4"}
    truth = f"<answer>{truth}</answer>"
    return {"question": question, "ground_truth": truth, "model_output": output} | more


def tagged(answer):
    return f"<think>so</think><answer>{answer}</answer>"


def log_of(tmp_path, rows, name="log.jsonl"):
    (tmp_path / name).write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return scoring.read_log(tmp_path / name)


def test_the_published_mmvu_log_scores_65_76(sample, capsys, monkeypatch):
    path = sample("mmvu_twgrpo_eval.jsonl")
    log = scoring.read_log(path)
    summary = scoring.summarize(log)
    overall = summary.shares["overall"]
    assert overall.questions == 625 and not log.duplicates and not log.errors
    assert round(overall.strict, 2) == round(overall.soft, 2) == 65.76
    assert summary.form == 100 and summary.disagreements == 0 and not summary.unfit
    low, high = overall.strict_interval
    assert 61 < low < 63 and 68 < high < 70  # 65.76 +- 1.96 * 1.9
    assert len(summary.shares) == 2 + 27  # overall, single and the 27 subjects of MMVU
    monkeypatch.setattr(sys, "argv", ["eval.py", "score", str(path), "--markdown"])
    evaluation.main()
    assert "| mmvu_twgrpo_eval | 625 | 65.76 |" in capsys.readouterr().out


def test_strict_and_soft_by_hand(tmp_path):
    rows = [row(tagged("A"), "A", 0), row(tagged("B"), "A", 1), row(tagged("A"), "A,C", 2),
            row(tagged("C, A"), "A,C", 3), row(tagged("A,B"), "A,C", 4)]  # fmt: skip
    shares = scoring.summarize(log_of(tmp_path, rows)).shares
    assert (shares["overall"].strict, shares["overall"].soft) == (40.0, 50.0)
    assert (shares["single"].questions, shares["single"].strict) == (2, 50.0)
    assert (shares["multi"].questions, shares["multi"].soft) == (3, 50.0)


def test_the_two_rules_of_extraction(tmp_path):
    """A bare letter earns nothing from the think-style evaluators, and everything from the general
    zero-shot one, whose log tells itself by an extracted answer that is the whole output."""
    assert log_of(tmp_path, [row("A")]).answers[0].soft == 0
    assert log_of(tmp_path, [row("A", extracted_answer="")]).answers[0].soft == 0
    assert log_of(tmp_path, [row(" A\n", extracted_answer="A")]).answers[0].soft == 1
    assert log_of(tmp_path, [row("Answer: A")]).answers[0].soft == 1
    whole = "<answer>A</answer>"
    assert log_of(tmp_path, [row(whole, extracted_answer=whole)]).answers[0].soft == 0
    assert log_of(tmp_path, [row(whole, extracted_answer="A")]).answers[0].soft == 1


def test_a_repeated_question_counts_once_and_is_named(tmp_path):
    rows = [row(tagged("A"), key=7), row(tagged("B"), key=8), row(tagged("B"), key=7)]
    log = log_of(tmp_path, rows)
    text = scoring.report(log, scoring.summarize(log))
    assert len(log.answers) == 2 and log.duplicates == ["7"]
    assert "duplicate rows, counted once: 1 (questions 7)" in text and " 50.00 [" in text


def test_answers_that_fit_no_rule_are_counted_and_shown(tmp_path):
    answers = ["A", "A, B", "B,", "CD", "c", "A/B", "", "D, <b>x</b>"]
    rows = [row(tagged(a), key=k) for k, a in enumerate(answers)]
    rows += [row(tagged("4 balls"), "3", 20), row(tagged("3.0"), "3", 21)]
    summary = scoring.summarize(log_of(tmp_path, rows))
    assert sum(summary.unfit.values()) == 6
    assert set(summary.unfit) == {"CD", "c", "A/B", "", "D, <b>x</b>", "4 balls"}


def test_a_logged_score_that_is_another_is_noticed(tmp_path):
    rows = [row(tagged("A"), key=0, accuracy_score=0.0), row(tagged("A"), key=1, accuracy_score=1)]
    assert scoring.summarize(log_of(tmp_path, rows)).disagreements == 1


def test_bad_rows_are_named_and_the_others_scored(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(row(tagged("A"))) + '\n{"torn\n5\n{"model_output": "A"}\n')
    log = scoring.read_log(path)
    assert len(log.answers) == 1 and len(log.errors) == 3
    text = scoring.report(log, scoring.summarize(log))
    assert all(f"bad row, not counted: line {k}: " in text for k in (2, 3, 4))


@pytest.mark.parametrize("text", ["", "[]", "5", '{"a": 1}', "\x00"])
def test_a_file_that_is_no_log_is_refused_by_name(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match="x.json"):
        scoring.read_log(tmp_path / "x.json")


def test_untrusted_text_reaches_neither_terminal_nor_table(tmp_path):
    rows = [row(tagged("\x1b[31mred|\n"), key=k) for k in ("a\x1b[2J", "b")]
    log = log_of(tmp_path, rows + rows, "a|b.jsonl")
    summary = scoring.summarize(log)
    assert "\x1b" not in scoring.report(log, summary)
    table = scoring.markdown([(log, summary)])
    assert "a\\|b" in table and len(table.splitlines()) == 3


def test_the_interval_is_the_bootstrap_of_drawing_questions():
    rng = np.random.default_rng(0)
    scores = rng.choice([0, 0.5, 1], 400, p=[0.3, 0.2, 0.5])
    drawn = [rng.choice(scores, 400).mean() * 100 for _ in range(4000)]
    low, high = scoring.interval(scores, 4000, seed=1)
    assert abs(low - np.percentile(drawn, 2.5)) < 0.4
    assert abs(high - np.percentile(drawn, 97.5)) < 0.4


def test_ten_thousand_rows_are_scored_in_ten_seconds(tmp_path):
    rng = random.Random(0)
    answers = ["A", "B", "A,B", "C", "x", ""]
    rows = [row(tagged(rng.choice(answers)) + "word " * 200, rng.choice(answers[:4]), k)
            for k in range(10_000)]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    start = time.perf_counter()
    log = scoring.read_log(tmp_path / "log.jsonl")
    scoring.report(log, scoring.summarize(log, resamples=1000))
    assert time.perf_counter() - start < 10 and len(log.answers) == 10_000


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from([tagged("A"), "A", "<answer>A,C</answer>", "Answer: B"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["problem_id", "solution", "video", "type", "x"]), inner),
    max_leaves=3,
)  # fmt: skip
LOG_KEYS = ["question", "ground_truth", "model_output", "extracted_answer", "accuracy_score"]
LOG_ROWS = st.builds(
    lambda key, value, k: {**row(tagged("A"), "A,C", k), key: value},
    st.sampled_from(LOG_KEYS), ANYTHING, st.integers(0, 3),
)  # fmt: skip


@settings(max_examples=2000, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(rows=st.lists(LOG_ROWS | LOG_ROWS | ANYTHING, max_size=3))
def test_any_log_gives_numbers_or_a_data_error(rows, tmp_path):
    path = tmp_path / "fuzz.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        log = scoring.read_log(path)
    except DataError as error:
        assert str(path) in str(error)
        return
    summary = scoring.summarize(log, resamples=10)
    assert len(log.answers) + len(log.duplicates) + len(log.errors) == len(rows)
    assert all(0 <= s.strict <= s.soft <= 100 for s in summary.shares.values())
    assert scoring.report(log, summary) and scoring.markdown([(log, summary)])


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


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_of(path):
    return {r["question"]["id"]: r["model_output"] for r in read_rows(path)}


def test_a_run_writes_one_row_a_question_in_the_official_form(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "log.jsonl"
    eval_py(monkeypatch, run_flags(world, out, "--prompt", "think", "--limit", "12"))
    rows, records = read_rows(out), read_rows(world / "train.jsonl")
    assert [r["question"] for r in rows] == records[:12]
    official = {"question", "ground_truth", "model_output", "extracted_answer", "think_content",
                "accuracy_score", "format_score"}  # fmt: skip
    assert official <= set(rows[0]) and rows[0]["video_grid"] == [2, 4, 4]
    summary = scoring.summarize(scoring.read_log(out))
    assert summary.disagreements == 0 and summary.shares["overall"].questions == 12
    assert f"{summary.shares['overall'].strict:6.2f} [" in capsys.readouterr().out


def test_a_run_killed_at_any_point_goes_on_where_it_stopped(world, tmp_path, monkeypatch):
    """kill -9 in the middle, then a torn line as a power cut leaves it; nothing twice, nothing
    lost, and the answers are those of a run that was never stopped."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    eval_py(monkeypatch, run_flags(world, whole, "--batch_size", "5"))
    command = [sys.executable, PROJECT / "eval.py", *run_flags(world, out, "--batch_size", "1")]
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
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


def test_an_old_log_with_other_settings_is_not_mixed_with(world, tmp_path, monkeypatch):
    out = tmp_path / "log.jsonl"
    eval_py(monkeypatch, run_flags(world, out, "--limit", "2"))
    before = out.read_bytes()
    with pytest.raises(SystemExit, match="made with another prompt, seed"):
        eval_py(monkeypatch, run_flags(world, out, "--prompt", "direct", "--seed", "1"))
    out.write_bytes(before + b"not a row\n")
    with pytest.raises(SystemExit, match="line 3: is not valid JSON .*choose another file"):
        eval_py(monkeypatch, run_flags(world, out))
    assert out.read_bytes() == before + b"not a row\n"


def test_ranks_split_the_questions_and_write_one_file(world, tmp_path, monkeypatch, capsys):
    """What torchrun does, one rank after the other: no question twice, none left out, and the
    answers of one process (which also sampled: a question's stream does not know its rank)."""
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    sampled = ("--temperature", "1.0", "--batch_size", "4")
    eval_py(monkeypatch, run_flags(world, alone, *sampled))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        eval_py(monkeypatch, run_flags(world, shared, *sampled))
    assert len(read_rows(shared)) == 24 and answers_of(shared) == answers_of(alone)
    assert "rank 1: 12 questions answered, 0 skipped" in capsys.readouterr().out


def append_rows(path, writer):
    log = evaluation.RowLog(path, {"prompt": "think"})
    for k in range(50):
        log.append({"question": [writer, k], "text": "x" * 20_000})


def test_processes_that_write_at_once_do_not_tear_each_others_rows(tmp_path):
    path = str(tmp_path / "log.jsonl")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_rows, args=(path, w)) for w in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    rows = read_rows(tmp_path / "log.jsonl")
    assert sorted(r["question"] for r in rows) == [[w, k] for w in range(4) for k in range(50)]


def test_unreadable_clips_are_skipped_counted_and_tried_again(world, tmp_path, monkeypatch, capfd):
    rows = read_rows(world / "train.jsonl")[:4]
    rows[3]["problem"] = "What is <|video_pad|>?"  # a question no prompt can hold
    (tmp_path / "clips").mkdir()
    for row_ in (*rows[:2], rows[3]):
        (tmp_path / row_["video"]).write_bytes((world / row_["video"]).read_bytes())
    (tmp_path / rows[1]["video"]).write_bytes(b"no video")
    (tmp_path / "q.json").write_text(json.dumps(rows))
    out = tmp_path / "log.jsonl"
    places = ("--data", tmp_path / "q.json", "--video_root", tmp_path)
    eval_py(monkeypatch, run_flags(world, out, *places))
    text, errors = capfd.readouterr()
    assert "1 questions answered, 3 skipped" in text
    assert "skipped question train-3: record train-3: its prompt holds 2 <|video_pad|>" in errors
    assert "skipped question train-1: " in errors and "train_002.mp4: no such video" in errors
    (tmp_path / rows[2]["video"]).write_bytes((world / rows[2]["video"]).read_bytes())
    eval_py(monkeypatch, run_flags(world, out, *places))
    assert "1 questions answered, 2 skipped" in capfd.readouterr().out
    assert set(answers_of(out)) == {"train-0", "train-2"}
    (tmp_path / "q.json").write_text(json.dumps(rows[1:2]))
    with pytest.raises(SystemExit, match="none of its 1 questions could be shown"):
        eval_py(monkeypatch, run_flags(world, tmp_path / "other.jsonl", *places))


def test_out_of_memory_halves_the_batch_and_loses_nothing(capfd):
    sizes = []

    def generate(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [str(k) for k in batch]

    assert list(evaluation.answered(range(1, 21), generate, 16)) == [str(k) for k in range(1, 21)]
    assert sizes[:4] == [16, 8, 4, 2] and set(sizes[4:]) == {2}
    assert "out of memory: 8 questions at a time" in capfd.readouterr().err


def test_one_question_that_does_not_fit_ends_with_a_remedy():
    def generate(batch):
        raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(ModelError, match="one question alone .* lower --max_pixels"):
        list(evaluation.answered([1, 2, 3], generate, 2))
    with pytest.raises(RuntimeError, match="another"):
        list(
            evaluation.answered(
                [1], lambda batch: (_ for _ in ()).throw(RuntimeError("another")), 1
            )
        )


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--temperature", "-1"], "--temperature must be 0 or more"),
        (["--top_p", "0"], "--top_p must be"), (["--batch_size", "0"], "--batch_size must be"),
        (["--repeat_frames", "3"], "--repeat_frames must be"),
        (["--model", "/nowhere/at/all"], "no such model directory"),
        (["--data", "/nowhere.json"], "no such file"),
        (["--out", "/nowhere/log.jsonl"], "cannot be written"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense(flags, sentence, world, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=sentence):
        eval_py(monkeypatch, run_flags(world, tmp_path / "log.jsonl", *flags))


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
        tokens, _ = sample(logits, 1.0, uniform, banned, top_p)
        assert set(tokens.tolist()) == kept
    tokens, _ = sample(logits, 1.0, uniform, banned, 0.6)
    assert abs((tokens == 1).float().mean() - 0.5 / 0.8) < 0.03  # renormalised


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


def test_counting_trains_and_evaluates_with_qwen2_vl(world, policy, tmp_path, monkeypatch):
    """DVD-counting's form, integer answers, --reward_funcs accuracy format, on a tiny Qwen2-VL: the
    right number earns its reward in training, and the log of the trained model can be scored."""
    base = as_qwen2_vl(policy)
    base.save(tmp_path / "qwen2_vl")
    clips = sorted((world / "clips").glob("train_*.mp4"))[:4]
    rows = [{"problem": "How many shapes?", "solution": f"<answer> {k} </answer>",
             "video_filename": f"./clips/{clip.name}"} for k, clip in enumerate(clips)]  # fmt: skip
    data = tmp_path / "dvd.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in rows))
    monkeypatch.setattr(ranks.StopSignal, "__init__", lambda self: setattr(self, "requested", 0))
    prompts = []
    render = twgrpo.Prompter.render
    monkeypatch.setattr(
        twgrpo.Prompter, "render", lambda self, r: prompts.append(render(self, r)) or prompts[-1]
    )
    texts = iter(["<think>a</think><answer>0</answer>", "<answer>1</answer>"] * 999)
    monkeypatch.setattr("policy.Policy.decode", lambda self, completion: next(texts))
    flags = ["--model_name_or_path", tmp_path / "qwen2_vl", "--jsonl_path", data, "--video_root",
             world, "--output_dir", tmp_path / "run", "--max_steps", "2", "--num_generations", "2",
             "--per_device_train_batch_size", "2", "--reward_funcs", "accuracy", "format",
             *toy_flags()]  # fmt: skip
    directory = twgrpo.run(twgrpo.parse_config([str(flag) for flag in flags]))
    assert all("final answer (number) in <answer>" in prompt for prompt in prompts)
    metrics = read_rows(directory / "metrics.jsonl")
    rewards = [m["rewards/accuracy"] for m in metrics]  # solutions 0 and 1 are said half the time
    assert sum(rewards) == pytest.approx(0.5) and all(m["rewards/format"] == 0.5 for m in metrics)
    assert all(np.isfinite(m["loss"]) and m["grad_norm"] > 0 for m in metrics)

    out = tmp_path / "dvd.log.jsonl"
    flags = ("--benchmark", "dvd", "--model", directory / "checkpoint-2", "--data", data)
    eval_py(monkeypatch, run_flags(world, out, *flags))
    log = scoring.read_log(out)
    assert len(log.answers) == 4 and all(number(a.answer) is not None for a in log.answers)
    assert scoring.summarize(log).shares["overall"].strict == 50.0


def toy_flags():
    return [str(x) for k, v in toy.CLIP.items() for x in (f"--{k}", v)] + [
        "--max_completion_length", "6",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------- ask


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


def test_ask_about_a_missing_clip_is_one_sentence(world, tmp_path, monkeypatch):
    flags = ["ask", "--model", world / "model", "--video", tmp_path / "no.mp4", "--question", "?"]
    with pytest.raises(SystemExit, match="error: .*no.mp4: no such video file"):
        eval_py(monkeypatch, flags)


# -------------------------------------------------------------------------------------------- docs


def test_every_command_of_the_docs_is_one_the_parsers_take():
    """docs/prompts.md: each line is parsed, and every style of data.py has its row."""
    text = (PROJECT / "docs" / "prompts.md").read_text(encoding="utf-8")
    block = text[text.index("```bash") : text.index("```\n", text.index("```bash") + 9)]
    lines = [line.split("eval.py ", 1)[1] for line in block.splitlines() if "eval.py " in line]
    assert len(lines) >= 9
    for line in lines:
        evaluation.check_flags(evaluation.parser().parse_args(line.split()))
    for line in (line for line in block.splitlines() if "twgrpo.py " in line):
        twgrpo.parse_config(line.split("twgrpo.py ", 1)[1].split())
    assert all(f"| `{style}` |" in text for style in STYLES)
    named = set(re.findall(r"`(--[a-z_]+)", text))
    assert all(f'"{flag}"' in (PROJECT / "eval.py").read_text() or flag == "--question_type"
               for flag in named)  # fmt: skip
