"""The prompts made of records: their text, their ids, and the clips in them.

python -m tests.test_prompts      writes tests/golden anew, one file a style; read the diff
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import toy
import video
from data import STYLES, Prompter, check_prompts
from files import UserError
from records import Record, as_record
from run.config import Config
from run.setup import make_prompter
from video import Geometry, VideoError

GOLDEN = Path(__file__).resolve().parent / "golden"
ASKED = dict(problem="What does she take?", solution="<answer>B</answer>", video="a.mp4")
ROWS = {
    "options apart from the problem": {
        **ASKED,
        "options": ["A. a red ball", "B. a blue ball"],
        "problem_type": "multiple choice",
    },
    "options in the problem": {
        "problem": "Which will not happen?\nA. red hits blue\nB. blue hits red",
        "solution": "<answer>A,B</answer>",
        "video": "a.mp4",
    },
    "options without letters": {**ASKED, "options": ["a red ball", "a blue ball"]},
    "a number": {**ASKED, "problem": "How many balls fall?", "solution": "<answer> 3 </answer>"},
    "a text": {**ASKED, "problem": "What does the sign say?", "problem_type": "OCR", "options": []},
    "braces": {**ASKED, "problem": "What is {answer} {0} {{x}}?"},
}
TOKENIZER = toy.build_tokenizer(["a"])


def rendered(style: str) -> tuple[str, list[tuple[str, list[int]]]]:
    """The file of a style, each case in the chat form of Qwen2.5-VL; and the prompts with their
    ids."""
    text, prompts = "", []
    for kind in ("mixed", "single", "multiple") if style == "think" else ("mixed",):
        prompter = Prompter(TOKENIZER, toy.CHAT_TEMPLATE, Geometry(), kind, style=style)
        for name, row in ROWS.items():
            title = name + (f", --question_type {kind}" if style == "think" else "")
            prompts.append(prompter.tokenize(as_record(row, "row 1", Path("videos"))))
            text += f"===== {title}\n{prompts[-1][0]}\n"
    return text, prompts


@pytest.mark.parametrize("style", STYLES)
def test_prompts_equal_the_golden_files(style):
    """tests/golden was compared with the official templates, blank for blank. The ids are those of
    tokenizing the prompt as a whole."""
    text, prompts = rendered(style)
    assert text == (GOLDEN / f"{style}.txt").read_text(encoding="utf-8")
    for prompt, ids in prompts:
        assert ids == TOKENIZER(prompt, add_special_tokens=False)["input_ids"]


def test_fixed_timing_tells_one_second_per_patch(prompter, policy, records):
    video_id, ids = policy.model.config.video_token_id, []
    # 4 frames of 2 s: 7 / 12 s apart, 7 / 6 s a patch; two positions a second
    for told, gap in ((None, 2), (1.0, 2), (0.5, 1)):
        question = replace(prompter, seconds_per_patch=told)(records[0])
        first, second = question.positions_3P[0][question.ids_P == video_id].unique().tolist()
        assert second - first == gap
        ids.append(question.ids_P.tolist())
    assert ids[0] == ids[1] == ids[2]


def test_the_official_evaluators_frames_of_a_clevrer_clip(sample, prompter):
    """10 sampled frames shown as 16, 1,496 tokens; in training 10 frames, 935 tokens."""
    record = Record("1", "Why?", "A", sample("clevrer_video_12176.mp4"))
    for repeat, tokens, frames in ((0, 935, 5), (16, 1496, 8)):
        question = replace(prompter, repeat_frames=repeat, clips=video.DEFAULTS)(record)
        assert len(question.patches) // 4 == tokens and question.grid[0] == frames


def test_a_question_holds_one_id_per_video_token(prompter, records, policy):
    question = prompter(records[0])
    video_ids = question.ids_P == policy.model.config.video_token_id
    assert int(video_ids.sum()) == len(question.patches) // 4 == 8
    assert question.positions_3P.shape == (3, len(question.ids_P))
    assert question.seconds == pytest.approx(7 / 3 / 4)
    text = policy.tokenizer.decode(question.ids_P[~video_ids])
    assert text == question.prompt.replace("<|video_pad|>", "")


@pytest.mark.parametrize("token", toy.SPECIAL_TOKENS)
def test_a_question_that_holds_a_special_token_is_refused(token, prompter, records):
    """It would end the user's turn, or show a second video."""
    with pytest.raises(UserError, match=re.escape(f"the model's special token {token}")):
        prompter.tokenize(replace(records[0], problem=f"What is {token}?"))


def test_questions_that_cannot_become_a_prompt_are_all_named_before_a_run(prompter, records):
    long = [replace(records[0], id=f"long-{k}", problem="word " * 5000) for k in range(2)]
    with pytest.raises(UserError, match=r"q.json: 2 question\(s\) that cannot") as error:
        check_prompts(prompter, [*records, *long], "q.json")
    for name in ("long-0", "long-1"):
        assert f"record {name}: its prompt has " in str(error.value)
    assert "--max_prompt_length and the model allow 4,096" in str(error.value)
    # OFFICIAL: cut from the left, video tokens included.  OURS: never cut; refused by default.
    _, ids = replace(prompter, max_prompt_length=10**5).tokenize(long[0])
    assert len(ids) > 5000 and prompter.tokenize(records[0])[1][:10] == ids[:10]
    check_prompts(prompter, records, "q.json")


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for %}", "the model's chat template fails on it"),
        ("{{ messages[0].content + 1 }}", "the model's chat template fails on it"),
        ("{{ raise_exception('no videos') }}", r"fails on it \(no videos\)"),
        ("{{ messages[0].content[1].text }}", "shows 0 videos"),
        (toy.CHAT_TEMPLATE + toy.CHAT_TEMPLATE, "shows 2 videos"),
    ],
)
def test_a_broken_chat_template_is_a_sentence(template, reason, prompter, records):
    with pytest.raises(UserError, match=reason):
        check_prompts(replace(prompter, chat_template=template), records[:1], "q.json")


def test_a_clip_with_too_many_tokens_is_refused_like_an_unreadable_one(prompter, policy, records):
    length = len(prompter.tokenize(records[0])[1])
    prompter.max_prompt_length = length + 7
    assert len(prompter(records[0]).ids_P) == length + 7
    prompter.max_prompt_length -= 1
    check_prompts(prompter, records[:1], "q.json")  # its text fits
    with pytest.raises(VideoError, match=f".mp4: its prompt has {length + 7} tokens; --max"):
        prompter(records[0])
    longest = make_prompter(Config(max_prompt_length=10**9), policy).max_prompt_length
    assert longest == policy.text.config.max_position_embeddings


if __name__ == "__main__":
    for style in STYLES:
        (GOLDEN / f"{style}.txt").write_text(rendered(style)[0], encoding="utf-8")
