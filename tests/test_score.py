"""Logs of evaluations: their scores, and how they survive crashes, full disks and other runs."""

import json
import os
import random
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from files import UserError
from tools import score


def row(output, truth="A", key=0, **more):
    question = {"problem_id": key, "problem": "?", "video": f"/MVBench/clips/{key}.mp4"}
    truth = f"<answer>{truth}</answer>"
    return {"question": question, "ground_truth": truth, "model_output": output} | more


def tagged(answer):
    return f"<think>so</think><answer>{answer}</answer>"


def log_of(tmp_path, rows, name="log.jsonl"):
    (tmp_path / name).write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return score.read_log(tmp_path / name)


def test_the_published_mmvu_log_scores_65_76(sample):
    log = score.read_log(sample("mmvu_twgrpo_eval.jsonl"))
    summary = score.summarize(log)
    overall = summary.shares["overall"]
    assert overall.questions == 625 and not log.duplicates and not log.errors
    assert round(overall.strict, 2) == round(overall.soft, 2) == 65.76
    assert summary.form == 100 and summary.disagreements == 0 and not summary.unfit
    low, high = overall.strict_interval
    assert 61 < low < 63 and 68 < high < 70  # 65.76 +- 1.96 * 1.9
    assert len(summary.shares) == 2 + 27  # overall, single and the 27 subjects of MMVU
    assert "| mmvu_twgrpo_eval | 625 | 65.76 |" in score.markdown([(log, summary)])


def test_strict_and_soft_by_hand(tmp_path):
    cases = [("A", "A"), ("B", "A"), ("A", "A,C"), ("C, A", "A,C"), ("A,B", "A,C")]
    rows = [row(tagged(answer), truth, k) for k, (answer, truth) in enumerate(cases)]
    shares = score.summarize(log_of(tmp_path, rows)).shares
    assert (shares["overall"].strict, shares["overall"].soft) == (40.0, 50.0)
    assert (shares["single"].questions, shares["single"].strict) == (2, 50.0)
    assert (shares["multi"].questions, shares["multi"].soft) == (3, 50.0)


def test_the_two_rules_of_extraction(tmp_path):
    """A bare letter earns nothing from the think-style evaluators, and everything from the general
    zero-shot one, whose logs are told by an extracted answer that is the whole output."""
    for output, extracted, soft in [
        ("A", None, 0),
        ("A", "", 0),
        (" A\n", "A", 1),
        ("Answer: A", None, 1),
        ("<answer>A</answer>", "<answer>A</answer>", 0),
        ("<answer>A</answer>", "A", 1),
    ]:
        log = log_of(tmp_path, [row(output, extracted_answer=extracted)])
        assert log.answers[0].soft == soft


def test_a_repeated_question_counts_once_and_is_named(tmp_path):
    rows = [row(tagged("A"), key=7), row(tagged("B"), key=8), row(tagged("B"), key=7)]
    log = log_of(tmp_path, rows)
    text = score.report(log, score.summarize(log))
    assert len(log.answers) == 2 and log.duplicates == ["7"]
    assert "duplicate rows, counted once: 1 (questions 7)" in text and " 50.00 [" in text


def test_answers_that_fit_no_rule_are_counted_and_shown(tmp_path):
    answers = ["A", "A, B", "B,", "CD", "c", "A/B", "", "D, <b>x</b>"]
    rows = [row(tagged(a), key=k) for k, a in enumerate(answers)]
    rows += [row(tagged("4 balls"), "3", 20), row(tagged("3.0"), "3", 21)]
    summary = score.summarize(log_of(tmp_path, rows))
    assert sum(summary.unfit.values()) == 6
    assert set(summary.unfit) == {"CD", "c", "A/B", "", "D, <b>x</b>", "4 balls"}


def test_a_logged_score_that_differs_is_noticed(tmp_path):
    rows = [row(tagged("A"), key=0, accuracy_score=0.0), row(tagged("A"), key=1, accuracy_score=1)]
    assert score.summarize(log_of(tmp_path, rows)).disagreements == 1


def test_bad_rows_are_named_and_the_others_scored(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(row(tagged("A"))) + '\n{"torn\n5\n{"model_output": "A"}\n')
    log = score.read_log(path)
    assert len(log.answers) == 1 and len(log.errors) == 3
    text = score.report(log, score.summarize(log))
    assert all(f"bad row, not counted: line {k}: " in text for k in (2, 3, 4))


@pytest.mark.parametrize("text", ["", "[]", "5", '{"a": 1}', "\x00"])
def test_a_file_that_is_no_log_is_refused_by_name(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="x.json"):
        score.read_log(tmp_path / "x.json")


def test_untrusted_text_reaches_neither_terminal_nor_table(tmp_path):
    rows = [row(tagged("\x1b[31mred|\n"), key=k) for k in ("a\x1b[2J", "b")]
    log = log_of(tmp_path, rows + rows, "a|b.jsonl")
    summary = score.summarize(log)
    assert "\x1b" not in score.report(log, summary)
    table = score.markdown([(log, summary)])
    assert "a\\|b" in table and len(table.splitlines()) == 3


def test_the_interval_is_the_bootstrap_of_drawing_questions():
    rng = np.random.default_rng(0)
    scores = rng.choice([0, 0.5, 1], 400, p=[0.3, 0.2, 0.5])
    drawn = [rng.choice(scores, 400).mean() * 100 for _ in range(4000)]
    low, high = score.interval(scores, 4000, seed=1)
    assert abs(low - np.percentile(drawn, 2.5)) < 0.4
    assert abs(high - np.percentile(drawn, 97.5)) < 0.4


def test_ten_thousand_rows_are_scored_in_ten_seconds(tmp_path):
    answers = random.Random(0).choices(["A", "B", "A,B", "C", "x", ""], k=10_000)
    rows = [row(tagged(answer) + "word " * 200, key=k) for k, answer in enumerate(answers)]
    start = time.perf_counter()
    log = log_of(tmp_path, rows)
    score.report(log, score.summarize(log, resamples=1000))
    assert time.perf_counter() - start < 10 and len(log.answers) == 10_000


TEXTS = st.text(max_size=12) | st.sampled_from([tagged("A"), "<answer>A,C</answer>", "Answer: B"])
NAMES = st.sampled_from(["problem_id", "solution", "video", "type", "x"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner),
    max_leaves=3,
)
LOG_KEYS = st.sampled_from([*row(""), "extracted_answer", "accuracy_score"])
LOG_ROWS = st.builds(
    lambda key, value, k: row(tagged("A"), "A,C", k) | {key: value},
    *(LOG_KEYS, ANYTHING, st.integers(0, 3)),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@given(rows=st.lists(LOG_ROWS | LOG_ROWS | ANYTHING, max_size=3))
def test_any_log_gives_numbers_or_one_sentence(rows, directory):
    try:
        log = log_of(directory, rows)
    except UserError as error:
        assert "log.jsonl" in str(error)
        return
    summary = score.summarize(log, resamples=10)
    assert len(log.answers) + len(log.duplicates) + len(log.errors) == len(rows)
    assert all(0 <= s.strict <= s.soft <= 100 for s in summary.shares.values())
    assert score.report(log, summary) and score.markdown([(log, summary)])


# ----------------------------------------------------------------------------------- a log to write

OURS = json.dumps({"question": {"id": 0}, "run": {"prompt": "think"}})
OTHER = json.dumps({"question": {"id": 1}, "run": {"prompt": "direct"}})
NO_LOGS = [
    *('[{"problem": "?"}]', "[]", '{"a": 1}', '{\n  "a": 1\n}', "a line\nthe last line", "\x00"),
    *('{"question": "why", "answer": "A"}', '{"question": "why"}\n{"question": "how", "ans'),
    *('{"question": {}, "model_output": "A"}\n', "{" * 100_000),
]


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "text, reason",
    [
        *((text, "line 1 is not a row of eval.py run; choose another file") for text in NO_LOGS),
        (f"{OURS}\n{OURS}\nnot a row", "line 3 is not a row"),
        (f"{OURS}\nnot a row\n{OURS[:20]}", "line 2 is not a row"),
        (f"{OURS}\n{OTHER}\n", "line 2 was made with another prompt; choose another file"),
        (OTHER, "line 1 was made with another prompt; choose another file"),
    ],
)
def test_a_file_that_is_no_log_of_this_run_is_left_as_it_is(text, reason, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--out .*mine.json: {reason}"):
        with score.open_log(str(path), {"prompt": "think"}):
            pass
    assert path.read_text() == text and os.listdir(tmp_path) == ["mine.json"]


def test_a_log_of_this_run_is_mended_in_its_last_line_only(tmp_path):
    path = tmp_path / "log.jsonl"
    for text, whole in {
        "": "",
        OURS[:30]: "",
        f"{OURS}\n": f"{OURS}\n",
        f"{OURS}\n{OURS[:20]}": f"{OURS}\n",
        f"{OURS}\n{OURS}": f"{OURS}\n",  # even if only its line break is missing
    }.items():
        path.write_text(text)
        with score.open_log(str(path), {"prompt": "think"}) as log:
            assert path.read_text() == whole and len(log.done) == whole.count("\n")


def test_a_second_run_into_the_same_log_is_refused_while_the_first_lives(tmp_path):
    (tmp_path / "alias.jsonl").symlink_to(tmp_path / "log.jsonl")
    with score.open_log(str(tmp_path / "log.jsonl"), {}):
        for name in ("log.jsonl", "alias.jsonl"):
            with pytest.raises(UserError, match=f"{name}: another eval.py run is writing to it"):
                with score.open_log(str(tmp_path / name), {}):
                    pass
    with score.open_log(str(tmp_path / "alias.jsonl"), {}) as log:
        log.append({"question": 1})
    assert len(read_rows(tmp_path / "log.jsonl")) == 1


def test_a_row_that_does_not_fit_on_the_disk_is_absent(tmp_path):
    """The kernel itself writes a part of the row, then refuses."""
    path = tmp_path / "log.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with score.open_log(str(path), {}) as log:
        log.append({"question": 1})
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
        try:
            with pytest.raises(UserError, match="log.jsonl: cannot be written .*resumes it"):
                log.append({"question": "x" * 1000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        log.append({"question": 2})
    assert [row["question"] for row in read_rows(path)] == [1, 2]


def test_ranks_that_write_at_once_do_not_tear_each_others_rows(tmp_path):
    path = tmp_path / "log.jsonl"

    def write_rows(rank):
        log = score.RowLog(path, {"prompt": "think"}, set())
        for k in range(50):
            log.append({"question": [rank, k], "text": "x" * 20_000})

    with ThreadPoolExecutor(4) as ranks:
        list(ranks.map(write_rows, range(4)))
    assert sorted(r["question"] for r in read_rows(path)) == [
        [w, k] for w in range(4) for k in range(50)
    ]
