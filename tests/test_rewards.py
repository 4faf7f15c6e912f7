"""The rewards against the official rules, restated here, and the published completions."""

import json
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rewards import (
    accuracy_reward,
    compare_answers,
    extract_answer,
    format_reward,
    number,
    origin_accuracy_reward,
    strict_format_reward,
)

PIECES = (
    "<think>|</think>|<answer>|</answer>| |!|\n|A|A,C|B, |x|\u2003|<|\x1c|Answer|answer:".split("|")
)
COMPLETIONS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
SOFT = {  # the truth: what each answer to it earns
    "A,C": {"A,C": 1, "C, A": 1, "A": 1 / 2, "A,A": 1 / 2, "A,B": 0, "A,B,C": 0, "A/C": 0, "AC": 0},
    "A,B,C": {"A": 1 / 3, "A, B, and C": 0},
    "B": {"": 0, "B,": 0, "b": 0},
    # Numbers, of DVD-counting and MMVU, are right if they are equal.
    " 3 ": {"3": 1, "3.0": 1, "+3": 1, "03": 1, "3,3": 1},
    "3": {"4": 0, "3,4": 0, "three": 0, "3 balls": 0, "": 0, "٣": 0},
    "3.14": {"3.14": 1, "3.140": 1, "3.141": 0},
    "0.5": {".5": 1},
    "1,000": {"1000": 1, "1": 0, "1e3": 0, "9" * 5000: 0},
    "1000": {"1,000": 1},
    "-2": {"-2": 1, "2": 0},
}


@pytest.mark.parametrize("truth", SOFT)
def test_soft_and_binary_accuracy(truth):
    """A subset of the truth earns its share, anything wrong among the answers earns nothing."""
    for answer, soft in SOFT[truth].items():
        completion, solution = f"<think/><answer>{answer}</answer>", f"<answer>{truth}</answer>"
        assert accuracy_reward(completion, solution) == pytest.approx(soft), answer
        assert origin_accuracy_reward(completion, solution) == float(soft == 1)


@pytest.mark.parametrize("text", ["", ".", "+", "1,00", "1,0000", "1 000", "1.2.3", "A", "5%", "²"])
def test_what_is_no_plain_number(text):
    assert number(text) is None


@pytest.mark.parametrize(
    "text, reward, strict",
    [
        (" <think>a</think>\n<answer>A</answer>\n", 1, 1),
        ("<think></think><answer></answer>", 1, 1),
        ("so: <think>a</think>\n <answer>A</answer>", 1, 0),
        ("<think>a</think><answer>A</answer> !! ", 1, 0),
        ("<think>a</think><answer>A</answer> and", 0, 0),
        ("<think>a</think> so <answer>A</answer>", 0, 0),
        ("<think>a</think><think>b</think><answer>A</answer>", 0, 0),
        ("<think>a<answer>A</answer>", 0, 0),
    ],
)
def test_format(text, reward, strict):
    """Training's form, and the evaluators', who allow nothing before or after."""
    assert (format_reward(text), strict_format_reward(text)) == (reward, strict)


def official_format(text: str) -> float:
    """aa529ff grpo.py: duplicate tags fail, then a search of the stripped text."""
    if text.count("<think>") > 1 or text.count("<answer>") > 1:
        return 0.0
    pattern = r"<think>.*?</think>\s*<answer>.*?</answer>[\s!]*$"
    return float(bool(re.search(pattern, text.strip(), re.DOTALL)))


def official_strict_format(text: str) -> float:
    """aa529ff src/eval/*.py, check_format."""
    pattern = (
        r"^(?!.*<think>.*<think>)(?!.*<answer>.*<answer>)<think>.*?</think>\s*<answer>.*?</answer>$"
    )
    return float(bool(re.match(pattern, text.strip(), re.DOTALL)))


def official_extraction(text: str) -> str:
    """aa529ff src/eval/*.py, extract_answer."""
    tagged = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return tagged.group(1).strip()
    named = re.search(r"(?:answer|Answer|ANSWER)[:\s]+([A-Z](?:\s*,\s*[A-Z])*)", text)
    return named.group(1).strip() if named else ""


def official_accuracy(text: str, solution: str) -> float:
    """aa529ff grpo.py, after the symbolic check that never fires on letters."""

    def answers(t):
        match = re.search(r"<answer>(.*?)</answer>", t, re.DOTALL)
        t = match.group(1).strip() if match else t.strip()
        return {part.strip() for part in t.replace(" ", "").split(",")}

    student, truth = answers(text), answers(solution)
    return len(student) / len(truth) if student.issubset(truth) else 0.0


@given(COMPLETIONS, COMPLETIONS)
@example("A", "<answer>A</answer>")
@example("<answer>A", "<answer>A")
@example("<answer>A</answer> <answer>B</answer>", "A")
@example("answer: B <answer>A</answer>", "B")
@example("The answer is A", "A")
@example("the answer\n B", "B")
@example("ANSWER:A , C. And B", "A,C")
@example("aNSWER: A", "A")
@example("answer: c", "c")
@example("<think>a</think><answer>b</answer></answer>!", "b")
@example("<think></think></think> <answer></answer>", "")
@example("<think></think><answer></answer></answer>", "")
@example("<think><answer></think><answer></answer>", "")
def test_rewards_equal_the_official_rules(text, solution):
    assert accuracy_reward(text, solution) == official_accuracy(text, solution)
    assert format_reward(text) == official_format(text)
    assert strict_format_reward(text) == official_strict_format(text)
    assert extract_answer(text) == official_extraction(text)


NASTY = st.text() | st.binary().map(lambda b: b.decode("utf-8", "surrogateescape"))
NUMBERS = st.from_regex(r"[-+]?[0-9,]{0,6}\.?[0-9]{0,3}", fullmatch=True)


@given(NASTY | COMPLETIONS | NUMBERS, NASTY | COMPLETIONS | NUMBERS)
def test_any_two_strings_get_a_reward_between_0_and_1(text, solution):
    for reward in (accuracy_reward, origin_accuracy_reward, format_reward, strict_format_reward):
        assert 0.0 <= reward(text, solution) <= 1.0
    assert 0.0 <= compare_answers(extract_answer(text), solution) <= 1.0
    assert accuracy_reward(solution, solution) == 1.0  # the truth itself is right


def test_published_completions_earn_their_logged_format_reward(sample):
    rows = [json.loads(s) for s in sample("training_completions_head.jsonl").open(encoding="utf-8")]
    assert len(rows) == 400
    assert all(format_reward(row["completion"]) == row["format_reward"] for row in rows)


ATTACKS = "<think>|<answer>|</answer>|! |<think></think>|,| |A,|9|9,|answer|answer:|answer A"
ATTACKS += "|answer A , |ANSWER\n\n|answer " + " " * 500


@pytest.mark.parametrize("piece", ATTACKS.split("|"))
def test_a_megabyte_takes_no_time(piece):
    """All rewards and both readings take about 0.1 s of CPU; quadratic time would be minutes."""
    text = piece * (2**20 // len(piece))
    for attack in (text, text + "x", f"<think>{text}</think><answer>{text}x", f"answer {text}"):
        start = time.process_time()
        accuracy_reward(attack, "<answer>A</answer>"), accuracy_reward(attack, "3")
        format_reward(attack), strict_format_reward(attack), extract_answer(attack)
        assert time.process_time() - start < 2
