"""Logs of evaluations: their scores, and how they survive crashes, full disks and other runs."""

import json
import re
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import json_values
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


def log_of(directory, rows, name="log.jsonl"):
    """The log of these rows; text is written as it is."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    (directory / name).write_text("\n".join(lines) + "\n")
    return score.read_log(directory / name)


def test_the_published_mmvu_log_scores_65_76(sample):
    log = score.read_log(sample("mmvu_twgrpo_eval.jsonl"))
    parts, table = score.parts(log), score.table([log])
    assert len(log.answers) == 625 and list(parts) == ["overall", "single"]
    mean, low, high = score.accuracy(parts["overall"] == 1)
    assert round(mean, 2) == 65.76 and (parts["overall"] == 1).sum() == parts["overall"].sum()
    assert 61 < low < 63 and 68 < high < 70  # 65.76 +- 1.96 * 1.9
    assert "format rate 100.00\n" in table
    assert re.findall(r"^- .*: (\d+)", table, re.MULTILINE) == ["0"] * 4  # nothing odd


def test_strict_and_soft_by_hand(tmp_path):
    cases = [("A", "A"), ("B", "A"), ("A", "A,C"), ("C, A", "A,C"), ("A,B", "A,C")]
    log = log_of(tmp_path, [row(tagged(a), truth, k) for k, (a, truth) in enumerate(cases)])
    scores = {name: soft_Q.tolist() for name, soft_Q in score.parts(log).items()}
    assert scores == dict(overall=[1, 0, 0.5, 1, 0], single=[1, 0], multi=[0.5, 1, 0])
    cells = [c.strip() for c in score.table([log]).splitlines()[2].split("|")]
    assert cells[2:5] == ["overall", "5", "40.00"] and cells[6] == "50.00"


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


def test_odd_rows_are_counted_and_shown(tmp_path):
    """Answers that fit no rule, repeated and bad rows, and another accuracy than the logged one."""
    answers = ["A", "A, B", "B,", "CD", "c", "A/B", "", "D, <b>x</b>"]
    rows = [row(tagged(a), key=k, accuracy_score=float(k < 1)) for k, a in enumerate(answers)]
    rows += [row(tagged("4 balls"), "3", 20), row(tagged("3.0"), "3", 21, accuracy_score=0.5)]
    rows.append(row(tagged("a red ball"), "a blue ball", 22))
    log = log_of(tmp_path, [*rows, rows[3], '{"torn', 5, {"model_output": "A"}])
    assert [a.soft for a in log.answers] == [1, *[0] * 8, 1, 0] and len(log.errors) == 3
    unfit = ["CD", "c", "A/B", "", "D, <b>x</b>", "4 balls"]
    assert [a.text for a in log.answers if not a.fits] == unfit
    shown = score.table([log])
    for note in (
        "answers that fit no rule: 6 ('CD'; 'c'; ",
        "duplicate rows, counted once: 1 (line 12)\n",
        "bad rows, not counted: 3 (line 13: ",
        "rows whose logged accuracy_score differs: 1",
    ):
        assert f"- {note}" in shown
    for text in ("", "\x00", "[]"):
        with pytest.raises(UserError, match="x.json: "):
            log_of(tmp_path, [text], "x.json")


def test_untrusted_text_reaches_neither_terminal_nor_table(tmp_path):
    rows = [row(tagged("\x1b[31mred|\n"), key=k) for k in ("a\x1b[2J\n", "b")]
    log = log_of(tmp_path, rows + rows, "a|b.jsonl")
    table, notes, _ = score.table([log, log]).split("\n\n")
    assert "\x1b" not in table + notes and len(notes.splitlines()) == 5
    lines = table.splitlines()
    assert len(lines) == 2 + 2 * 2 and all(line.startswith("| a\\|b | ") for line in lines[2:])


def test_the_interval_is_the_bootstrap_of_drawing_questions():
    rng = np.random.default_rng(0)
    scores = rng.choice([0, 0.5, 1], 400, p=[0.3, 0.2, 0.5])
    drawn = [rng.choice(scores, 400).mean() * 100 for _ in range(4000)]
    expected = np.percentile(drawn, [2.5, 97.5])
    assert score.accuracy(scores, 4000)[1:] == pytest.approx(expected, abs=0.4)


KEYS = [*row(""), "extracted_answer", "accuracy_score"]
ANYTHING = json_values(KEYS, [tagged("A"), "<answer>A,C</answer>", "Answer: B"])
CHANGES = st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=1)
LOG_ROWS = CHANGES.map(lambda change: row(tagged("A"), "A,C", len(str(change))) | change)


@given(rows=st.lists(LOG_ROWS | LOG_ROWS | ANYTHING, max_size=3))
def test_any_log_gives_numbers_or_one_sentence(rows, tmp_path_factory):
    try:
        log = log_of(tmp_path_factory.getbasetemp(), map(json.dumps, rows))
    except UserError as error:
        assert "log.jsonl" in str(error)
        return
    assert len(log.answers) + len(log.duplicates) + len(log.errors) == len(rows)
    assert all(0 <= a.soft <= 1 for a in log.answers) and score.table([log])


# ----------------------------------------------------------------------------------- a log to write

OURS = json.dumps({"question": {"id": 0}, "run": {"prompt": "think"}})
OTHER = OURS.replace("think", "direct")
NO_LOGS = ['[{"problem": "?"}]', '{\n  "a": 1\n}', "a line\nthe last line", "\x00", "{" * 100_000]
NO_LOGS += ['{"question": {}, "model_output": "A"}\n', '{"question": "why"}\n{"question": "ho']
NO_LOGS += ['{"question": "why", "answer": "A"}']  # a whole row, though its line does not end


def questions_in(path):
    return [json.loads(line)["question"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "text, reason",
    [
        *((text, "line 1 is not a row of eval.py run; choose another file") for text in NO_LOGS),
        (f"{OURS}\n{OURS}\nnot a row", "line 3 is not a row"),
        (f"{OURS}\nnot a row\n{OURS[:20]}", "line 2 is not a row"),
        (f"{OURS}\n{OTHER}\n", "line 2 was made with another prompt; choose another file"),
    ],
)
def test_a_file_that_is_no_log_of_this_run_is_left_as_it_is(text, reason, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--out .*mine.json: {reason}"):
        score.resume(path, {"prompt": "think"})
    assert path.read_text() == text


def test_a_log_of_this_run_is_mended_in_its_last_line_only(tmp_path):
    """A cut row, or one that lacks only its line break, is answered again."""
    path = tmp_path / "log.jsonl"
    for rows in (0, 1):
        for last in ("", OURS[:20], OURS):
            whole = f"{OURS}\n" * rows
            path.write_text(whole + last)
            done = score.resume(path, {"prompt": "think"})
            assert path.read_text() == whole and len(done) == rows


def test_a_row_that_does_not_fit_on_the_disk_is_cut_off_when_the_run_goes_on(tmp_path):
    """The kernel itself writes a part of the row, then refuses."""
    path = tmp_path / "log.jsonl"
    score.append(path, {"question": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            score.append(path, {"question": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    score.append(path, {"question": 2})
    assert questions_in(path) == [1, 2]


def test_ranks_that_write_at_once_do_not_tear_each_others_rows(tmp_path):
    path = tmp_path / "log.jsonl"
    with ThreadPoolExecutor(4) as ranks:
        for k in range(200):
            ranks.submit(score.append, path, {"question": k, "text": "x" * 20_000})
    assert sorted(questions_in(path)) == list(range(200))
