"""Rewards on strings: what a completion says against what the record says is right.

Each function takes one completion and one solution and returns a float in [0, 1]; none raises on
any string, and each takes time linear in its length (the official regular expressions do not: they
are restated here with string search, and tests compare the two). Source: the official code at
aa529ff, src/open_r1/grpo.py.
"""


def tagged_answer(text: str) -> str:
    """The text inside the first <answer>...</answer>, else the whole text; outer blanks removed."""
    _, opening, rest = text.partition("<answer>")
    inside, closing, _ = rest.partition("</answer>")
    return (inside if opening and closing else text).strip()


def answer_set(text: str) -> set[str]:
    """Blanks removed, split at commas: "A, C" -> {"A", "C"}; "" -> {""}; "CD" -> {"CD"}."""
    return {part.strip() for part in tagged_answer(text).replace(" ", "").split(",")}


def accuracy_reward(completion: str, solution: str) -> float:
    """The soft, multi-level reward: the share of the true answers that were found, 0 if anything
    wrong is among them.

    |answer| / |truth| if answer is a subset of truth, else 0. "A" against "A,C" earns 0.5; "A,B"
    earns 0.
    OFFICIAL: a symbolic check (math-verify) runs first; it never fired on letter answers, and is
    left out here.
    """
    answer, truth = answer_set(completion), answer_set(solution)
    return len(answer) / len(truth) if answer <= truth else 0.0


def origin_accuracy_reward(completion: str, solution: str) -> float:
    """The binary reward of the baselines: 1 if the answer is exactly the truth, else 0."""
    return float(accuracy_reward(completion, solution) == 1.0)


def format_reward(completion: str, solution: str = "") -> float:
    """1 if the text ends in <think>...</think> <answer>...</answer>, else 0; the solution plays no
    part.

    Text may stand before <think>, blanks and "!" after </answer>; a second <think> or <answer>
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


REWARDS = {
    "accuracy": accuracy_reward,
    "origin_accuracy": origin_accuracy_reward,
    "format": format_reward,
}
