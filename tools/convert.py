"""Makes training records from dataset files: CLEVRER's scenes, and question-answer inversion.

    clevrer_rows    scenes with choices -> rows with lettered options; drops those with none right
    negate          a question -> its negation, or None if it cannot be negated
    invert          a single-answer question -> its negation, with several right answers
    qai_rows        rows of NExT-GQA or STAR -> rows, a fraction p of them inverted

    python -m tools.convert clevrer RAW.json OUT.json
    python -m tools.convert qai IN OUT --seed S [--p 0.5]

Question-answer inversion (paper, "QAI"): "What did she take?" with one right option becomes "What
didn't she take?", where every wrong option is right and the right one wrong. A random number of the
now right options is kept, so that always answering "all but one" does not work.

OFFICIAL (data/question_answer_inverse/*.py): a question that cannot be negated stays, but its
answers are inverted (22 of 1,668 NExT-GQA rows); no seed; negated questions are lower-cased; STAR
rows get NExT-QA's paths.
OURS: such a row is kept unchanged and counted; one seed, one result; case and paths stay.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from files import UserError, one_sentence, replacing
from records import LETTERS, as_record, load_records, option_texts, read_rows, refuse
from rewards import answer_set

# ------------------------------------------------------------------------------------------ clevrer


def clevrer_rows(path: str) -> tuple[list[dict], Counter]:
    """Counterfactual questions from CLEVRER's own file as training rows, and counts of the rest.

    A question may have several right choices; those with none are dropped, as in the official file
    (9,238 remain in validation). Raises UserError naming scenes in the wrong format.
    """
    rows, counts, errors = [], Counter(written=0), []
    for k, (_, scene) in enumerate(read_rows(Path(path), errors), 1):
        try:
            for question in scene["questions"]:
                if question["question_type"] != "counterfactual":
                    counts["of another type"] += 1
                elif (row := clevrer_row(scene, question))["solution"] == "<answer></answer>":
                    counts["left out, without a correct choice"] += 1
                else:
                    rows.append(as_record(row, "", Path()).row)  # as_record checks it
        except (KeyError, TypeError, ValueError) as error:
            reason = f"needs {error}" if isinstance(error, KeyError) else str(error)
            errors.append(f"scene {k}: {reason[:200]}")
    refuse(path, "scene(s) that are not as in CLEVRER's own question file", errors)
    counts["written"] = len(rows)
    return rows, counts


def clevrer_row(scene: dict, question: dict) -> dict:
    choices = dict(zip(LETTERS, question["choices"], strict=False))
    right = [letter for letter, choice in choices.items() if choice["answer"] == "correct"]
    lines = [f"{letter}. {choice['choice']}" for letter, choice in choices.items()]
    return {
        "id": f"{scene['scene_index']}-{question['question_id']}",
        "problem": "\n".join([question["question"], *lines]),
        "solution": f"<answer>{','.join(right)}</answer>",
        "video": scene["video_filename"],
        "question_type": "counterfactual",
    }


# --------------------------------------------------------------------------------------------- QAI

# The auxiliary to negate comes right after the question word ("why did", NExT-GQA), or after
# "which object", "which other object", "what else" (STAR's templates).
_QUESTION = re.compile(
    r"(?P<start>\s*(?:what|which|who|whom|why|how|where|when)(?:\s+(?:other\s+)?object|\s+else)?\s+)"
    r"(?P<word>did|does|do|is|are|was|were|would|will|happened|happens)(?![\w'’])",
    re.IGNORECASE,
)
_NEGATED = {"will": "won't", "happened": "didn't happen", "happens": "doesn't happen"}
_NEGATION = re.compile(r"\b(?:not|never|cannot|unable|no|nobody|nothing|none)\b|n['’]t\b", re.I)


def negate(question: str) -> str | None:
    """The question with its first auxiliary negated and all else unchanged; None if the result
    would not mean the opposite.

    "what did" -> "what didn't", "What will" -> "What won't", "What happened" -> "What didn't
    happen", "is the person able to" -> "is the person unable to". None for yes/no questions,
    questions without one of these words in place ("why the man bend down"), and questions that
    are already negated ("why did the boy not jump").
    """
    found = _QUESTION.match(question)
    if not found or _NEGATION.search(question):
        return None
    word, rest = found["word"], question[found.end() :]
    able = re.match(r"([^.?!]*?\b)able to\b", rest)
    if word.lower() in ("is", "are", "was", "were") and able:
        return question[: found.end()] + able[1] + "un" + rest[len(able[1]) :]
    negated = _NEGATED.get(word.lower(), word.lower() + "n't")
    if word[0].isupper():
        negated = negated.upper() if word.isupper() else negated.capitalize()
    return found["start"] + negated + rest


def invert(
    question: str, options: list[str], right: set[str], rng: np.random.Generator
) -> tuple[str, list[str], list[str]]:
    """(negated question, kept options, letters of the right ones among them).

    The formerly right option stays, now wrong. A random number (at least one) of the others, now
    right, is kept. The order is random and duplicate options are kept once. Raises ValueError with
    the reason if the question cannot be inverted.
    """
    offered = LETTERS[: len(options)]
    if len(right) != 1 or not right <= set(offered):
        raise ValueError("not a single-choice question with options")
    if (negated := negate(question)) is None:
        raise ValueError("cannot be negated")
    answer = offered.index(*right)
    plain = [" ".join(option.casefold().split()).rstrip(".") for option in options]
    if plain.count(plain[answer]) > 1:
        raise ValueError("right option occurs twice")
    others = [k for k in range(len(options)) if k != answer and plain.index(plain[k]) == k]
    if not others:
        raise ValueError("no other option")
    kept = rng.permutation(others)[: rng.integers(1, len(others) + 1)]
    order = rng.permutation([answer, *kept]).tolist()
    letters = [a for a, k in zip(LETTERS, order, strict=False) if k != answer]
    return negated, [options[k] for k in order], letters


def qai_rows(rows: list[dict], seed: int, p: float = 0.5) -> tuple[list[dict], Counter]:
    """Eq. 30: NExT-GQA or STAR rows, a fraction p of them inverted, in the official converter's
    format: problem with lines "A unwrap it", solution, is_negated, options "(A) unwrap it", and
    answer "(A),(C)" if the row had one.

    Each row's random stream is (seed, index), so rows are independent. A row that was drawn but
    cannot be inverted is kept unchanged and counted by reason.
    """
    out, counts = [], Counter(rows=len(rows), inverted=0)
    for k, row in enumerate(rows):
        record, rng = as_record(row, f"row {k + 1}", Path()), np.random.default_rng([seed, k])
        question = row["question"] if isinstance(row.get("question"), str) else record.problem
        options, right = option_texts(row.get("options")), None  # None: as in the row
        if rng.random() < p:
            try:
                answers = answer_set(record.solution)
                question, options, right = invert(question, options, answers, rng)
            except ValueError as reason:
                counts[f"kept ({reason})"] += 1
        lines = [f"{letter} {text}" for letter, text in zip(LETTERS, options, strict=False)]
        new = row | dict(question=question, problem="\n".join([question, *lines]))
        new["options"] = [f"({line[0]}){line[1:]}" for line in lines]
        new |= dict(solution=record.solution, is_negated=right is not None)
        if right is not None:
            counts["inverted"] += 1
            new["solution"] = f"<answer>{','.join(right)}</answer>"
            if "answer" in row:
                new["answer"] = ",".join(f"({letter})" for letter in right)
        out.append(new)
    return out, counts


# ------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    clevrer = commands.add_parser("clevrer", help="CLEVRER's own questions -> records")
    qai = commands.add_parser("qai", help="question-answer inversion of NExT-GQA or STAR rows")
    for command in (clevrer, qai):
        command.add_argument("file")
        command.add_argument("out", help="output file, a JSON list")
    qai.add_argument("--seed", type=int, default=42, help="the same seed gives the same bytes")
    qai.add_argument("--p", type=float, default=0.5, help="fraction of the questions to invert")
    args = parser.parse_args(arguments)
    with one_sentence():
        if args.command == "clevrer":
            rows, counts = clevrer_rows(args.file)
        elif 0 <= args.p <= 1 and args.seed >= 0:
            records = load_records(args.file)
            rows, counts = qai_rows([record.row for record in records], args.seed, args.p)
        else:
            raise UserError("--p is a share of the questions, 0 to 1; --seed is 0 or more")
        with replacing(Path(args.out)) as beside:
            beside.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(f"{args.out}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
