"""Records from files, and the prompts made of them."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import PROJECT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prompt_cases import GOLDEN, ROWS, rendered

import data
import toy
from data import (
    STYLES,
    DataError,
    Prompter,
    Record,
    load_records,
    option_letters,
    question_text,
    select_records,
    step_records,
)
from records import MAX_TEXT, as_record, join_video, option_texts, task_of

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


# Each format with what must come out of it: (row, problem, options, solution, kind, source).
FORMATS = {
    "clevrer": (
        {"problem": "Why?\nA. x\nB. y", "solution": "<answer>A,B</answer>", "video": "1.mp4"},
        ("Why?\nA. x\nB. y", (), "<answer>A,B</answer>", "multiple choice", "clevrer"),
    ),
    "video-r1": (
        {"problem_id": 4, "problem": "Why?", "data_type": "video", "options": ["A. x", "B. y"],
         "problem_type": "multiple choice", "solution": "<answer>B</answer>", "path": "./1.mp4"},
        ("Why?", ("A. x", "B. y"), "<answer>B</answer>", "multiple choice", "video-r1"),
    ),
    "nextgqa": (
        {"id": "1_1", "video": "1.mp4", "question": "why", "options": ["(A) x", "(B) y"],
         "answer": "(B)", "type": "CW"},
        ("why", ("A. x", "B. y"), "<answer>B</answer>", "multiple choice", "nextgqa"),
    ),
    "star": (
        {"id": "7", "video": "/1.mp4", "question": "Why?", "options": ["x", "y"],
         "solution": "<answer>A</answer>"},
        ("Why?", ("A. x", "B. y"), "<answer>A</answer>", "multiple choice", "star"),
    ),
    "video-r1-260k": (
        {"problem": "Why?", "options": ["A. x", "B. y"], "problem_type": "multiple choice",
         "solution": "<answer>A</answer>", "path": "./1.mp4", "data_source": "STAR"},
        ("Why?", ("A. x", "B. y"), "<answer>A</answer>", "multiple choice", "STAR"),
    ),
    "dvd": (
        {"problem": "How many?", "solution": "<answer> 3 </answer>", "video_filename": "./1.mp4"},
        ("How many?", (), "<answer> 3 </answer>", "numerical", "dvd"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_told_by_its_keys(name, tmp_path):
    row, expected = FORMATS[name]
    (record,) = load_records(write(tmp_path, json.dumps([row])), "root")
    found = (record.problem, record.options, record.solution, record.kind, record.source)
    assert found == expected and str(record.video) == "root/1.mp4" and record.row == row


def test_a_raw_clevrer_file_is_sent_to_its_conversion(tmp_path):
    with pytest.raises(DataError, match="python data.py clevrer"):
        load_records(write(tmp_path, '[{"video_filename": "1.mp4", "questions": []}]'))


@pytest.mark.parametrize(
    "options, texts",
    [
        (["A. x", "B. y"], ["x", "y"]), (["(A) x", "(B) y"], ["x", "y"]), (["A) x"], ["x"]),
        (["x", "y"], ["x", "y"]), (["B. x", "A. y"], ["B. x", "A. y"]), (None, []),
        (["A man", "B"], ["A man", "B"]), (["A. 1.5", "B. 2."], ["1.5", "2."]),
    ],
)  # fmt: skip
def test_option_texts_lose_their_letters_and_nothing_else(options, texts):
    assert option_texts(options) == texts


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"options": "A. x"}, "'options' that are not a list"),
        ({"options": ["A. x", 5]}, "needs 'options', a text"),
        ({"options": [f"o{k}" for k in range(27)]}, "at most 26"),
        ({"problem": "x" * (MAX_TEXT + 1)}, "100,001 characters of 'problem'"),
        ({"problem": "x" * 10_000_000}, "10,000,000 characters of 'problem'"),
        ({"options": ["x" * 60_000, "y" * 60_000]}, "more than 100,000 characters"),
        ({"problem": "half \ud800"}, "lone surrogate"),
        ({"problem_type": "riddle"}, "problem_type 'riddle'; known are multiple choice"),
        ({"problem_type": ["x"]}, "problem_type 'list'"),
        ({"data_type": "image"}, "about a 'image'; only videos"),
        ({"solution": "E" * 10_000}, "names no option"),
        ({"video": 7}, "needs 'video'"),
        ({"video": "../secret.mp4"}, "leaves --video_root"),
        ({"video": "a/../../secret.mp4"}, "leaves --video_root"),
        ({"video": "/./../x.mp4"}, "leaves --video_root"),
        ({"video": "a\0b.mp4"}, "no file can have"),
        ({"video": "x" * 5000}, "no file can have"),
        ({"video": "./"}, "names no file"),
    ],
)
def test_untrusted_rows_get_a_short_sentence(change, reason, tmp_path):
    with pytest.raises(DataError) as error:
        load_records(write(tmp_path, json.dumps([ROW, {**ROW, **change}])))
    message = str(error.value)
    assert "row 2: " in message and reason in message and len(message) < 400 + len(str(tmp_path))


def test_broken_json_is_named_by_line_and_column(tmp_path):
    with pytest.raises(DataError, match="line 3 column 1"):
        load_records(write(tmp_path, '[{"a": 1},\n{"b": 2},\n}]'))
    with pytest.raises(DataError, match=r"line 2: is not valid JSON \(.* at column 9\)"):
        load_records(write(tmp_path, '{"a": 1}\n{"b": 2,}', "q.jsonl"))
    with pytest.raises(DataError, match="line 1: is not valid JSON"):
        load_records(write(tmp_path, '{"problem": ' + "9" * 5000 + "}"))


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "q.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([ROW]).encode())
    assert len(load_records(tmp_path / "q.json")) == 1


@pytest.mark.parametrize(
    "name", ["a/b.mp4", "/a/b.mp4", "./a/b.mp4", "//.//./a/b.mp4", "a/../a/b.mp4", " a/b.mp4"]
)
def test_leading_slashes_and_dots_are_stripped(name, tmp_path):
    joined = join_video(tmp_path, name)
    assert os.path.normpath(joined) == str(tmp_path / "a/b.mp4")


def test_links_out_of_the_root_are_refused_and_links_within_it_are_not(tmp_path):
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "within").symlink_to(root / "real")
    (root / "out").symlink_to(tmp_path)
    (root / "file.mp4").symlink_to("/etc/hostname")
    assert join_video(root, "within/1.mp4") == root / "within/1.mp4"
    for name in ("out/1.mp4", "file.mp4", "within/../out/x.mp4"):
        with pytest.raises(ValueError, match="symbolic link out of --video_root"):
            join_video(root, name)
    (tmp_path / "alias").symlink_to(root)  # the root itself may be a link
    assert join_video(tmp_path / "alias", "real/1.mp4") == tmp_path / "alias/real/1.mp4"


@pytest.mark.parametrize(
    "name, count",
    [
        ("nextgqa_mixed_head.json", 60), ("nextgqa_raw_head.json", 300), ("mmvu_head.json", 60),
        ("mvbench_head.json", 60), ("videomme_head.json", 60),
    ],
)  # fmt: skip
def test_real_rows_all_load(name, count, sample):
    records = load_records(sample(name))
    assert len(records) == count
    assert all(option_letters(r.text, None) or r.options for r in records)
    assert len({task_of(r.row) for r in records}) > 1 or name == "mvbench_head.json"


@pytest.mark.parametrize("name", FORMATS)
def test_four_thousand_rows_load_in_two_seconds(name, tmp_path):
    path = write(tmp_path, json.dumps([{**FORMATS[name][0], "n": k} for k in range(4000)]))
    start = time.perf_counter()
    assert len(load_records(path, tmp_path)) == 4000
    assert time.perf_counter() - start < 2


KEYS = ("problem question solution answer options video path video_filename problem_type "
        "data_type id questions").split()  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["A. x", "(B) y", "<answer>A</answer>", "/a.mp4", "../b", "multiple choice"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=4,
)  # fmt: skip
GOOD = st.sampled_from([row for row, _ in FORMATS.values()])
NOISE = st.sampled_from([b""] * 12 + [b"\xff", b"{", b"\x00", b"]"])
MUTATED = st.builds(lambda row, key, value: {**row, key: value}, GOOD, st.sampled_from(KEYS), JSON)


@settings(max_examples=2000, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(rows=st.lists(GOOD | MUTATED | JSON, max_size=3), as_list=st.booleans(), noise=NOISE)
def test_any_file_gives_records_or_a_data_error(rows, as_list, noise, tmp_path):
    text = json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows))
    path = tmp_path / "fuzz.json"
    path.write_bytes(text.encode() + noise)
    try:
        records = load_records(path, tmp_path)
    except DataError as error:
        assert str(path) in str(error)
        return
    assert 0 < len(records) <= len(rows)
    for record in records:
        assert str(record.video).startswith(str(tmp_path)) and record.problem.strip()
        assert all(question_text(record, style) for style in STYLES)


# ------------------------------------------------------------------------------- python data.py


def data_py(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, PROJECT / "data.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_check_of_a_clean_file_exits_with_0(world):
    done = data_py("check", world / "test.jsonl", "--video_root", world, "--decode")
    assert done.returncode == 0, done.stderr
    assert "8 records, 0 bad row(s)" in done.stdout and "clips: 8, decoded; 0" in done.stdout
    assert "by source: clevrer 8" in done.stdout and "by question type: " in done.stdout


def test_check_names_every_fault(world, tmp_path, capsys):
    (tmp_path / "clips").symlink_to(world / "clips")
    good = "train_000.mp4"
    for name, made in (("text.mp4", b"no video" * 99), ("empty.mp4", b"")):
        (tmp_path / name).write_bytes(made)
    toy.write_mp4(tmp_path / "short.mp4", toy.np.zeros((1, 56, 56, 3), toy.np.uint8), 4)
    (tmp_path / "ok.mp4").write_bytes((world / "clips" / good).read_bytes())
    names = ["ok.mp4", "./ok.mp4", "text.mp4", "empty.mp4", "gone.mp4", "short.mp4", "../x.mp4",
             f"clips/{good}"]  # fmt: skip
    rows = [{**ROW, "video": name} for name in names] + [
        {**ROW, "solution": "E", "video": "ok.mp4"}
    ]
    path = write(tmp_path, json.dumps(rows))
    assert data.check(str(path), str(tmp_path), decode=True, timeout=60) is False
    out = capsys.readouterr().out
    for fault in ("ok.mp4: known under 2 names: ./ok.mp4, ok.mp4", "text.mp4: is not a video",
                  "empty.mp4: the file is empty", "gone.mp4: no such video file",
                  "short.mp4: ", "at least 2 are needed",
                  "row 7: has the video path '../x.mp4'",
                  "row 8: has the video path",
                  "row 9: the answer 'E' names no option"):  # fmt: skip
        assert fault in out, fault
    assert "6 records, 3 bad row(s)" in out and "by right answers: 2 6" in out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["qai", "{}/no.json", "{}/out.json"], "error: .*no.json: no such file"),
        (["qai", "{}/q.json", "{}/out.json", "--p", "2"], "error: --p is a share"),
        (["qai", "{}/q.json", "{}/no/out.json"], "error: .*out.json: cannot be written"),
        (["clevrer", "{}/q.json", "{}/out.json"], "error: .*q.json: scene 1: needs 'questions'"),
    ],
)
def test_errors_on_the_command_line_are_one_sentence(arguments, sentence, tmp_path, monkeypatch):
    write(tmp_path, json.dumps([ROW]))
    monkeypatch.setattr(sys, "argv", ["data.py", *(a.format(tmp_path) for a in arguments)])
    with pytest.raises(SystemExit, match=sentence) as error:
        data.main()
    assert "\n" not in str(error.value.code)  # a message for code: exit status 1


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


@pytest.mark.parametrize("style", STYLES)
def test_prompts_equal_the_golden_files(style):
    """Read tests/golden: they were compared with the official templates, blank for blank."""
    assert rendered(style) == (GOLDEN / f"{style}.txt").read_text(encoding="utf-8")


def test_options_are_shown_exactly_once_in_every_style():
    for row in ROWS.values():
        record = as_record(row, "row 1", GOLDEN)
        for style in STYLES:
            text = question_text(record, style)
            for option in row.get("options", []):
                assert text.count(option) == 1
            assert ("Options:" in text) == bool(row.get("options"))


def test_fixed_timing_tells_one_second_per_patch(policy, records):
    common = dict(tokenizer=policy.tokenizer, chat_template=policy.chat_template,
                  geometry=policy.geometry, **toy.CLIP)  # fmt: skip
    true, fixed = (Prompter(**common, seconds_per_patch=s)(records[0]) for s in (None, 1.0))
    assert true.ids_P.tolist() == fixed.ids_P.tolist()
    video_id = policy.model.config.video_token_id
    times = [sorted(set(q.positions_3P[0][q.ids_P == video_id].tolist())) for q in (true, fixed)]
    # 4 frames of 2 s: 7 / 12 s apart, 7 / 6 s a patch; two positions a second
    assert times[0][1] - times[0][0] == 2 and times[1][1] - times[1][0] == 2
    halved = Prompter(**common, seconds_per_patch=0.5)(records[0])
    axis = sorted(set(halved.positions_3P[0][halved.ids_P == video_id].tolist()))
    assert axis[1] - axis[0] == 1


def test_the_official_evaluators_frames_of_a_clevrer_clip(sample, policy):
    """10 sampled frames shown as 16, 1,496 tokens; in training 10 frames, 935 tokens."""
    record = Record("1", "Why?", "A", sample("clevrer_video_12176.mp4"))
    for repeat, tokens, frames in ((0, 935, 5), (16, 1496, 8)):
        prompter = Prompter(
            policy.tokenizer, policy.chat_template, policy.geometry, repeat_frames=repeat
        )
        question = prompter(record)
        assert len(question.patches) // 4 == tokens and question.grid[0] == frames


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
