"""Rewards: compare a completion with the record's solution, as strings.

    tagged_answer, answer_set     the answer as training reads it
    extract_answer                the answer as the evaluators read it, which differs
    accuracy_reward, origin_accuracy_reward, format_reward     training rewards
    strict_format_reward          the evaluators' format check

Each reward takes one completion and one solution and returns a float in [0, 1]. They accept any
string and take linear time. The official regular expressions do not, so they are reimplemented
here with string search, and tests compare the two. Source: the official code at aa529ff,
src/open_r1/grpo.py, and src/eval/*.py for the two evaluator functions.
Equation numbers refer to docs/equations.md.
"""

import re
from decimal import Decimal

# A plain number: sign, digits (grouped by thousands or not), decimals. Everything else is text.
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]*)?")
_LONGEST_NUMBER = 64  # characters; a longer one is text

# Linear time: neither "answer" nor a letter matches \s, so no two parts can match the same text.
_NAMED_ANSWER = re.compile(r"(?:answer|Answer|ANSWER)[:\s]+([A-Z](?:\s*,\s*[A-Z])*)")


def _inside_tags(text: str) -> str | None:
    """The text inside the first <answer>...</answer>, or None."""
    _, opening, rest = text.partition("<answer>")
    inside, closing, _ = rest.partition("</answer>")
    return inside.strip() if opening and closing else None


def tagged_answer(text: str) -> str:
    """The text inside the first <answer>...</answer>, else the whole text; stripped."""
    inside = _inside_tags(text)
    return text.strip() if inside is None else inside


def extract_answer(text: str) -> str:
    """The answer as the think-style evaluators read it: the text inside the first
    <answer>...</answer>, else the letters after the word "answer" ("Answer: A, C"), else "".

    So an untagged bare letter earns credit in training (`tagged_answer`) but not here.
    """
    inside, named = _inside_tags(text), _NAMED_ANSWER.search(text)
    if inside is not None:
        return inside
    return named[1] if named else ""


def letter_set(answer: str) -> set[str]:
    """Removes blanks and splits at commas: "A, C" -> {"A", "C"}; "" -> {""}; "CD" -> {"CD"}."""
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
    """Scores an answer, both without tags: the fraction of true letters it names, or 0 if it names
    a wrong one; numbers must be equal.

    |answer| / |truth| if answer is a subset of truth, else 0. "A" against "A,C" earns 0.5; "A,B"
    earns 0. "3.0" against "3" earns 1.
    OFFICIAL: a symbolic check (math-verify) runs first; if it fails, the sets are compared.
    OURS: no symbolic check. On letters it never fired, and on plain numbers it amounts to comparing
    values, as here.
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
    """Eq. 2, the baselines' binary reward: 1 if the answer is exactly right, else 0."""
    return float(accuracy_reward(completion, solution) == 1.0)


def format_reward(completion: str, solution: str = "") -> float:
    """Eq. 3: 1 if the text ends in <think>...</think> <answer>...</answer>, else 0; ignores the
    solution.

    Text is allowed before <think>, blanks and "!" after </answer>, but a second <think> or <answer>
    anywhere gives 0.
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
    """The evaluators' format check: 1 if the whole text, stripped, is <think>...</think> blanks
    <answer>...</answer>, else 0.

    Unlike `format_reward`, allows no text before <think> and no "!" after </answer>.
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
