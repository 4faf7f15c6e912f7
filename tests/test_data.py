"""Records from files, and the prompts made of them."""

import json

import pytest

import toy
from data import (
    DataError,
    Prompter,
    Record,
    load_records,
    option_letters,
    select_records,
    step_records,
)

ROW = {
    "problem": "What?\nA. red\nB. blue",
    "solution": "<answer>A,B</answer>",
    "video": "clips/1.mp4",
}


def write(tmp_path, text, name="q.json"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_json_list_and_jsonl_are_read_alike(tmp_path):
    rows = [ROW, {**ROW, "id": "x7"}]
    listed = load_records(write(tmp_path, json.dumps(rows)), "root")
    lines = load_records(
        write(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n", "q.jsonl"), "root"
    )
    assert [r.id for r in listed] == ["row 1", "x7"] and [r.id for r in lines] == ["line 1", "x7"]
    assert str(listed[0].video) == "root/clips/1.mp4"
    assert listed[1] == lines[1]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({**ROW, "solution": "<answer>C</answer>"}, "'C' names no option; the options are A, B"),
        ({**ROW, "solution": "<answer></answer>"}, "names no option"),
        ({**ROW, "solution": 7}, "needs 'solution'"),
        ({**ROW, "video": " "}, "needs 'video'"),
        ({"problem": "?"}, "needs 'solution'"),
        ([1], "is list, not an object"),
        (None, "is NoneType, not an object"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_number(row, reason, tmp_path):
    path = write(tmp_path, json.dumps([ROW, row]))
    with pytest.raises(DataError, match=r"(?s)q.json: 1 bad row.*row 2: ") as error:
        load_records(path)
    assert reason in str(error.value)


def test_every_bad_row_is_reported_not_just_the_first(tmp_path):
    lines = [json.dumps(ROW), "{broken", json.dumps({**ROW, "solution": "E"}), json.dumps(ROW)[:-3]]
    with pytest.raises(DataError, match="3 bad row") as error:
        load_records(write(tmp_path, "\n".join(lines), "q.jsonl"))
    assert all(f"line {k}: " in str(error.value) for k in (2, 3, 4))


@pytest.mark.parametrize("text", ["", "[]", "[{]", "[1, 2", "\x00", "[" * 100000])
def test_files_that_hold_no_records(text, tmp_path):
    with pytest.raises(DataError, match="q.json"):
        load_records(write(tmp_path, text))


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="nowhere.json: no such file"):
        load_records(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="cannot be read"):
        load_records(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'["\xff\xfe"]')
    with pytest.raises(DataError, match="UTF-8"):
        load_records(tmp_path / "latin.json")


@pytest.mark.parametrize(
    "problem, letters",
    [
        ("Why?\nA. x\nB. y", "AB"), ("Why?\nA x\nB y\nC z", "ABC"), ("Why?\n(A) x\n(B) y", "AB"),
        ("How many?", ""), ("A man walks.\nWhy?", ""), ("B. y\nA. x", ""),
    ],
)  # fmt: skip
def test_option_letters(problem, letters):
    assert option_letters(problem) == set(letters)


def test_options_list_tells_the_letters():
    assert option_letters("Why?", ["x", "y", "z"]) == {"A", "B", "C"}


def test_real_training_style_rows_load(sample):
    assert len(load_records(sample("nextgqa_mixed_head.json"))) == 60


def records_of(*answers):
    return [Record(str(k), "?", f"<answer>{a}</answer>", "v") for k, a in enumerate(answers)]


def test_select_records_by_number_of_answers_and_count():
    records = records_of("A", "A,B", "C", "B,C")
    assert [r.id for r in select_records(records, "single", 9, 0)] == ["0", "2"]
    assert [r.id for r in select_records(records, "multiple", 9, 0)] == ["1", "3"]
    assert select_records(records, "mixed", 9, 0) == records
    few = select_records(records, "mixed", 2, 0)
    assert len(few) == 2 and few == select_records(records, "mixed", 2, 0)
    with pytest.raises(DataError, match="--question_type multiple"):
        select_records(records[:1], "multiple", 9, 0)


def test_each_epoch_shows_every_record_once_in_a_fresh_order():
    records = records_of(*"ABCDE")
    shown = [r.id for step in range(10) for r in step_records(records, step, 2, seed=1)]
    epochs = [tuple(shown[k : k + 5]) for k in range(0, 20, 5)]
    assert all(sorted(epoch) == list("01234") for epoch in epochs)
    assert len(set(epochs)) > 1
    assert step_records(records, 7, 2, seed=1) == step_records(records, 7, 2, seed=1)


def test_the_rendered_prompt_to_the_letter(prompter, records):
    """The form of Qwen2.5-VL: system line, the clip first, then the official training template."""
    record = Record("1", "Why?\nA. x\nB. y", "<answer>A</answer>", records[0].video)
    assert prompter.render(record) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Why?\nA. x\nB. y"
        "  Output the thinking process in <think> </think> and final answer "
        "(letters separated by , if multiple) in <answer> </answer> tags."
        "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "kind, words",
    [("single", "(select one letter)"), ("multiple", "(select letters separated by ,)")],
)
def test_question_type_sets_the_prompt(kind, words, policy, records):
    prompter = Prompter(policy.tokenizer, policy.chat_template, policy.geometry, kind, **toy.CLIP)
    assert f"final answer {words} in <answer>" in prompter.render(records[0])


def test_a_question_holds_one_id_per_video_token(prompter, records, policy):
    question = prompter(records[0])
    video_ids = question.ids_P == policy.model.config.video_token_id
    assert int(video_ids.sum()) == len(question.patches) // 4 == 8
    assert question.positions_3P.shape == (3, len(question.ids_P))
    assert question.seconds == pytest.approx(7 / 3 / 4)
    text = policy.tokenizer.decode(question.ids_P[~video_ids])
    assert text == question.prompt.replace("<|video_pad|>", "")


def test_a_video_token_in_the_question_is_refused(prompter, records):
    record = Record("evil", "What is <|video_pad|>?", "<answer>A</answer>", records[0].video)
    with pytest.raises(DataError, match="record evil"):
        prompter(record)


def test_braces_in_a_question_are_text(prompter, records):
    record = Record("1", "What is {answer} {0} {{x}}?", "<answer>A</answer>", records[0].video)
    assert "What is {answer} {0} {{x}}?" in prompter.render(record)
