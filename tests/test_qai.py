"""Question-answer inversion and CLEVRER's conversion: what the official converters get wrong."""

import json
import random

import numpy as np
import pytest

from files import UserError
from records import LETTERS, load_records, option_texts
from rewards import answer_set
from tools.convert import clevrer_rows, invert, main, negate, qai_rows

NEXT = {
    "id": "1_1",
    "video": "1104/48.mp4",
    "question": "why did the Boy run",
    "options": ["(A) late", "(B) happy", "(C) chased", "(D) bored", "(E) cold"],
    "answer": "(C)",
    "type": "CW",
}
STAR = {
    "id": "7",
    "video": "/STAR/a.mp4",
    "question": "What did the person do with the Clothes?",
    "options": ["Lied on.", "Took.", "Put down.", "Washed."],
    "solution": "<answer>C</answer>",
}


@pytest.mark.parametrize(
    "question, negated",
    [
        ("why did the boy run", "why didn't the boy run"),
        ("How Does Anna know?", "How Doesn't Anna know?"),
        ("what are they doing", "what aren't they doing"),
        ("who is near  the dog ", "who isn't near  the dog "),
        ("WHAT DID he do", "WHAT DIDN'T he do"),
        ("What will the person do next?", "What won't the person do next?"),
        ("What happened after he sat?", "What didn't happen after he sat?"),
        ("what happens to the ball", "what doesn't happen to the ball"),
        ("Which object was taken by the person?", "Which object wasn't taken by the person?"),
        ("Which object did he take?", "Which object didn't he take?"),
        ("Which object would he take next?", "Which object wouldn't he take next?"),
        ("Which other object is held by the dog?", "Which other object isn't held by the dog?"),
        ("What else is he able to do with the Bag?", "What else is he unable to do with the Bag?"),
        ("Which object is the man able to throw?", "Which object is the man unable to throw?"),
    ],
)
def test_negation_reads_fluently_and_keeps_case_and_blanks(question, negated):
    assert negate(question) == negated


NOT_NEGATABLE = """
    why the man bend down; does the dog bite; why deos the man walk; did; why; whydid he;
    what activity is the child doing; why did the boy not jump; why didn't he jump;
    how did she make sure the boy does not fall; why isn’t it red; what didnt he do;
    how can the babies move; what is the person unable to do
"""


def test_what_cannot_be_negated_is_refused():
    for question in ["", *map(str.strip, NOT_NEGATABLE.split(";"))]:
        assert negate(question) is None, question


def generated(count: int) -> list[dict]:
    """Rows of both kinds with 2 to 6 options, some of them twice, some questions not negatable."""
    rng, rows = random.Random(0), []
    words = "ran Sat took the Ball a dog slowly home Red".split()
    starts = ["why did", "What does", "how is", "What will", "Which object was", "why the", "did"]
    for _ in range(count // 2):
        sizes = rng.choices((1, 2, 3), k=rng.randint(2, 6))
        texts = [" ".join(rng.choices(words, k=size)) for size in sizes]
        question = f"{rng.choice(starts)} the {rng.choice(words)} {rng.choice(words)}"
        right = LETTERS[rng.randrange(len(texts))]
        lettered = [f"({a}) {o}" for a, o in zip(LETTERS, texts, strict=False)]
        rows.append(NEXT | dict(question=question, options=lettered, answer=f"({right})"))
        solution = f"<answer>{right}</answer>"
        rows.append(STAR | dict(question=question, options=texts, solution=solution))
    return rows


def check_rules(rows: list[dict]) -> dict:
    """The rules of the inversion, told from each row and what became of it."""
    made, counts = qai_rows(rows, seed=3)
    assert counts["inverted"] == sum(row["is_negated"] for row in made)
    assert counts["rows"] == len(rows)
    for before, after in zip(rows, made, strict=True):
        old, new = option_texts(before["options"]), option_texts(after["options"])
        if not after["is_negated"]:
            assert after["question"] == before["question"] and new == old
            continue
        (right,) = answer_set(before.get("solution") or before["answer"].strip("()"))
        original = old[LETTERS.index(right)]
        now_right = {new[LETTERS.index(a)] for a in answer_set(after["solution"])}
        assert len(set(new)) == len(new) and set(new) <= set(old)  # nothing twice, nothing new
        assert original in new and now_right == set(new) - {original} != set()
        assert after["question"] != before["question"]
        assert len(set(before["question"].split()) - set(after["question"].split())) <= 1
        lines = [f"{letter} {text}" for letter, text in zip(LETTERS, new, strict=False)]
        assert after["problem"].split("\n") == [after["question"], *lines]
        assert after["video"] == before["video"] and after["options"][0] == f"(A) {new[0]}"
    return counts


@pytest.mark.slow
def test_ten_thousand_generated_rows_break_no_rule():
    counts = check_rules(generated(10_000))
    assert 2500 < counts["inverted"] < 4500
    assert counts["kept (cannot be negated)"] > 900
    assert counts["kept (right option occurs twice)"] > 100


def test_all_real_nextgqa_rows_break_no_rule(sample):
    rows = json.loads(sample("nextgqa_raw_head.json").read_text())
    assert len(rows) == 300 and 120 < check_rules(rows)["inverted"] < 180


def test_the_number_of_right_options_varies():
    """So that neither "all but one" nor "all" can be learned: 1 to 4 right of 2 to 5."""
    streams = map(np.random.default_rng, range(2000))
    rights = [invert("why did he go", list("abcde"), {"C"}, rng)[2] for rng in streams]
    shares = np.bincount([len(right) for right in rights]) / 2000
    assert shares == pytest.approx([0, 0.25, 0.25, 0.25, 0.25], abs=0.04)
    assert 0.3 < np.mean([right[0] == "A" for right in rights]) < 0.9  # shuffled


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """Rows do not depend on each other, and p is the share that is inverted. The file loads."""
    rows = generated(200)
    (tmp_path / "in.json").write_text(json.dumps(rows))
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        main(["qai", f"{tmp_path}/in.json", f"{tmp_path}/{name}.json", "--seed", seed])
    a, b, c = ((tmp_path / f"{n}.json").read_bytes() for n in "abc")
    assert a == b != c
    assert json.loads(a)[:20] == qai_rows(rows[:20], 5)[0]
    records = load_records(tmp_path / "a.json", tmp_path)
    assert all(r.options == () and "\nA " in r.problem for r in records)  # lettered in the text
    assert [qai_rows([NEXT] * 20, 0, p)[1]["inverted"] for p in (0.0, 1.0)] == [0, 20]


def test_a_row_that_cannot_be_inverted_is_kept_and_counted():
    rows = [dict(NEXT, answer="(A),(B)"), dict(NEXT, question="why the boy run")]
    rows += [dict(NEXT, options=["(A) late"], answer="(A)"), dict(STAR, options=None)]
    made, counts = qai_rows(rows, 0, p=1.0)
    assert not any(r["is_negated"] for r in made)
    assert made[0]["solution"] == "<answer>A,B</answer>" and made[0]["answer"] == "(A),(B)"
    assert counts["kept (not a single-choice question with options)"] == 2
    assert counts["kept (cannot be negated)"] == 1 and counts["kept (no other option)"] == 1


# ------------------------------------------------------------------------------------------ clevrer


RIGHT = dict(x="correct", y="wrong", z="correct")
CHOICES = [dict(choice=choice, answer=answer) for choice, answer in RIGHT.items()]
ASKED = dict(question_id=11, question="Without it?", question_type="counterfactual")
SCENE = {
    "video_filename": "video_10000.mp4",
    "scene_index": 10000,
    "questions": [
        {"question_type": "descriptive"},
        ASKED | {"choices": CHOICES},
        ASKED | {"choices": CHOICES[1:2]},
    ],
}


def test_clevrer_scenes_become_records(tmp_path, capsys):
    (tmp_path / "raw.json").write_text(json.dumps([SCENE]))
    main(["clevrer", f"{tmp_path}/raw.json", f"{tmp_path}/out.json"])
    counts = "1 written, 1 of another type, 1 left out, without a correct choice"
    assert counts in capsys.readouterr().out
    (record,) = load_records(tmp_path / "out.json", "clips")
    assert record.id == "10000-11" and record.solution == "<answer>A,C</answer>"
    assert str(record.video) == "clips/video_10000.mp4"
    assert record.problem == "Without it?\nA. x\nB. y\nC. z"


NO_ANSWER = {"question_type": "counterfactual", "choices": [{"choice": 1}]}


@pytest.mark.parametrize(
    "scene", [5, {}, {"questions": 3}, {"questions": [{}]}, {"questions": [NO_ANSWER]}]
)
def test_a_file_that_is_not_clevrers_is_named(scene, tmp_path):
    (tmp_path / "raw.json").write_text(json.dumps([SCENE, scene]))
    with pytest.raises(UserError, match="(?s)raw.json: 1 scene.*CLEVRER's own.* scene 2: "):
        clevrer_rows(tmp_path / "raw.json")
