"""The rewards against the official rules, restated here, and the published completions."""

import json
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rewards import accuracy_reward, answer_set, format_reward, origin_accuracy_reward

PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    " ",
    "!",
    "\n",
    "A",
    "A,C",
    "B, ",
    "x",
    "\u2003",
    "<",
    "\x1c",
]
COMPLETIONS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@pytest.mark.parametrize(
    "answer, truth, soft",
    [
        ("A,C", "A,C", 1.0), ("C, A", "A,C", 1.0), ("A", "A,C", 0.5), ("A", "A,B,C", 1 / 3),
        ("A,B", "A,C", 0.0), ("A,B,C", "A,C", 0.0), ("", "A", 0.0), ("B,", "B", 0.0),
        ("CD", "C,D", 0.0), ("c", "C", 0.0), ("C D", "C,D", 0.0), ("A/B", "A,B", 0.0),
        ("B, C, and D", "B,C,D", 0.0), ("A,A", "A,B", 0.5), ("3", " 3 ", 1.0),
    ],
)  # fmt: skip
def test_soft_and_binary_accuracy(answer, truth, soft):
    """A subset of the truth earns its share, anything wrong among the answers earns nothing."""
    completion, solution = (
        f"<think>..</think><answer>{answer}</answer>",
        f"<answer>{truth}</answer>",
    )
    assert accuracy_reward(completion, solution) == pytest.approx(soft)
    assert origin_accuracy_reward(completion, solution) == (1.0 if soft == 1 else 0.0)


def test_an_untagged_bare_letter_earns_credit_in_training():
    assert accuracy_reward("A", "<answer>A</answer>") == 1.0
    assert accuracy_reward("The answer is A", "<answer>A</answer>") == 0.0


def test_only_the_first_answer_counts_and_an_unclosed_one_is_no_answer():
    assert answer_set("<answer>A</answer> <answer>B</answer>") == {"A"}
    assert answer_set("<answer>A") == {"<answer>A"}


@pytest.mark.parametrize(
    "text, reward",
    [
        ("<think>a</think><answer>A</answer>", 1),
        ("so: <think>a</think>\n <answer>A</answer> !! ", 1),
        ("<think>a</think><answer>A</answer> and", 0),
        ("<think>a</think> so <answer>A</answer>", 0),
        ("<think>a</think><think>b</think><answer>A</answer>", 0),
        ("<answer>A</answer>", 0), ("", 0),
        ("<think>a<answer>A</answer>", 0), ("<think></think><answer></answer>", 1),
    ],
)  # fmt: skip
def test_format(text, reward):
    assert format_reward(text) == reward


def official_format(text: str) -> float:
    """aa529ff grpo.py: duplicate tags fail, then a search of the stripped text."""
    if text.count("<think>") > 1 or text.count("<answer>") > 1:
        return 0.0
    pattern = r"<think>.*?</think>\s*<answer>.*?</answer>[\s!]*$"
    return float(bool(re.search(pattern, text.strip(), re.DOTALL)))


def official_accuracy(text: str, solution: str) -> float:
    """aa529ff grpo.py, after the symbolic check that never fires on letters."""

    def answers(t):
        match = re.search(r"<answer>(.*?)</answer>", t, re.DOTALL)
        t = match.group(1).strip() if match else t.strip()
        return {part.strip() for part in t.replace(" ", "").split(",")}

    student, truth = answers(text), answers(solution)
    return len(student) / len(truth) if student.issubset(truth) else 0.0


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(COMPLETIONS)
@example("<think>a</think><answer>b</answer></answer>!")
@example("<think></think></think> <answer></answer>")
def test_format_equals_the_official_expression(text):
    assert format_reward(text) == official_format(text)


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(COMPLETIONS, COMPLETIONS)
def test_accuracy_equals_the_official_rule(text, solution):
    assert accuracy_reward(text, solution) == official_accuracy(text, solution)


def test_published_completions_earn_their_logged_format_reward(sample):
    lines = sample("training_completions_head.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 400
    assert all(format_reward(row["completion"]) == row["format_reward"] for row in rows)


@pytest.mark.parametrize(
    "piece", ["<think>", "<answer>", "</answer>", "! ", "<think></think>", ",", " "]
)
def test_a_megabyte_takes_no_time(piece):
    text = piece * (2**20 // len(piece))
    start = time.perf_counter()
    for attack in (text, text + "x", f"<think>{text}</think><answer>{text}x"):
        accuracy_reward(attack, "<answer>A</answer>"), format_reward(attack)
    assert time.perf_counter() - start < 0.6  # three texts, two rewards: under 0.2 s a text
