"""Rewards on strings: what a completion says against what the record says is right.

    tagged_answer, answer_set     what training reads as the answer
    extract_answer                what the evaluators read as the answer, which is not the same
    accuracy_reward, origin_accuracy_reward, format_reward     training's rewards
    strict_format_reward          the evaluators' form

Each reward takes one completion and one solution and returns a float in [0, 1]. None raises on any
string, and each takes linear time; the official regular expressions do not, so they are restated
here with string search, and tests compare the two. Source: the official code at aa529ff,
src/open_r1/grpo.py, and src/eval/*.py for the evaluators' two.
Equations by number: docs/equations.md.
"""

import re
from decimal import Decimal

# A plain number: sign, digits (in groups of three, or not), decimals. Everything else is text.
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]*)?")
_LONGEST_NUMBER = 64  # characters; a longer one is text

# Linear: neither "answer" nor a letter matches \s, so no two parts compete for the same text.
_NAMED_ANSWER = re.compile(r"(?:answer|Answer|ANSWER)[:\s]+([A-Z](?:\s*,\s*[A-Z])*)")


def _inside_tags(text: str) -> str | None:
    """The text inside the first <answer>...</answer>, None if there is none."""
    _, opening, rest = text.partition("<answer>")
    inside, closing, _ = rest.partition("</answer>")
    return inside.strip() if opening and closing else None


def tagged_answer(text: str) -> str:
    """The text inside the first <answer>...</answer>, else the whole text; outer blanks removed."""
    inside = _inside_tags(text)
    return text.strip() if inside is None else inside


def extract_answer(text: str) -> str:
    """What the think-style evaluators take for the answer: the text inside the first
    <answer>...</answer>, else the letters after the word "answer" ("Answer: A, C"), else "".

    An untagged bare letter therefore earns credit in training (`tagged_answer`) and none here.
    """
    inside, named = _inside_tags(text), _NAMED_ANSWER.search(text)
    if inside is not None:
        return inside
    return named[1] if named else ""


def letter_set(answer: str) -> set[str]:
    """Blanks removed, split at commas: "A, C" -> {"A", "C"}; "" -> {""}; "CD" -> {"CD"}."""
    return {part.strip() for part in answer.replace(" ", "").split(",")}


def answer_set(text: str) -> set[str]:
    """`letter_set` of the tagged answer: "<answer>A, C</answer>" -> {"A", "C"}."""
    return letter_set(tagged_answer(text))


def number(text: str) -> Decimal | None:
    """The value of a plain number: "3", "-0.50", "1,000"; None if the text is anything else."""
    text = text.strip()
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", ""))


def compare_answers(answer: str, truth: str) -> float:
    """How right an answer is, both without tags: the share of the true letters it names, 0 if it
    names a wrong one; numbers are right if they are equal.

    |answer| / |truth| if answer is a subset of truth, else 0. "A" against "A,C" earns 0.5; "A,B"
    earns 0. "3.0" against "3" earns 1.
    OFFICIAL: a symbolic check (math-verify) runs first; if it fails, the sets are compared.
    OURS: no symbolic check. On letters it never fired, and on plain numbers it means equal values,
    which are compared here.
    """
    answers, truths = letter_set(answer), letter_set(truth)
    value = number(truth)
    if value is not None:
        return float(answers == truths or number(answer) == value)
    return len(answers) / len(truths) if answers <= truths else 0.0


def accuracy_reward(completion: str, solution: str) -> float:
    """Eq. 1, the soft, multi-level reward: `compare_answers` of the two tagged answers."""
    return compare_answers(tagged_answer(completion), tagged_answer(solution))


def origin_accuracy_reward(completion: str, solution: str) -> float:
    """Eq. 2, the binary reward of the baselines: 1 if the answer is exactly the truth, else 0."""
    return float(accuracy_reward(completion, solution) == 1.0)


def format_reward(completion: str, solution: str = "") -> float:
    """Eq. 3: 1 if the text ends in <think>...</think> <answer>...</answer>, else 0, whatever the
    solution.

    Text may come before <think>, blanks and "!" after </answer>; a second <think> or <answer>
    anywhere fails.
    """
    if completion.count("<think>") != 1 or completion.count("<answer>") != 1:
        return 0.0
    end = len(completion)
    while end and (completion[end - 1].isspace() or completion[end - 1] == "!"):
        end -= 1
    before, _, answer = completion[:end].partition("<answer>")
    _, _, thought = before.partition("<think>")
    return float(thought.rstrip().endswith("</think>") and answer.endswith("</answer>"))


def strict_format_reward(completion: str, solution: str = "") -> float:
    """The evaluators' form: 1 if the whole text, outer blanks aside, is <think>...</think> blanks
    <answer>...</answer>, else 0.

    Unlike with `format_reward`, nothing may come before <think> and no "!" after </answer>.
    """
    text = completion.strip()
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return 0.0
    return format_reward(text)


REWARDS = {
    "accuracy": accuracy_reward,
    "origin_accuracy": origin_accuracy_reward,
    "format": format_reward,
}
