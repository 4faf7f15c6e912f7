"""The events toy: its clips show what its rows say, its answers follow from them; `--toy`."""

import re
from typing import get_args, get_type_hints

import numpy as np
import pytest

import events
import toy
from data import Prompter
from files import UserError
from records import load_records
from rewards import format_reward
from run.config import Config, check_changes, parse_config, settings_of
from video import ClipSettings, Geometry

ROWS = [events.scene(np.random.default_rng(seed)) for seed in range(300)]


def seen(frames: np.ndarray) -> list[tuple[str, str]]:
    """The ball and the shape of each moment, read from the pixels of both its frames."""
    found = []
    for pair in frames.reshape(4, 2, 28 * 28, 3):
        names = [
            {name for name, rgb in table.items() if (frame == rgb).all(-1).sum() > 20}
            for frame in pair
            for table in (events.BALLS, events.COLOURS)
        ]
        assert names[0] == names[2] and names[1] == names[3]
        found.append((*names[0], *names[1]))
    return found


def test_the_answer_follows_from_what_the_frames_show():
    for frames, row in ROWS:
        moments = seen(frames)
        question, *options = row["problem"].split("\n")
        ball, when, mark = re.fullmatch(r"Which does (\w+) hit (\w+) (\w+)[?]", question).groups()
        asked = [colour for _, colour in moments].index(mark)
        span = moments[:asked] if when == "before" else moments[asked + 1 :]
        right = {colour for hitter, colour in span if hitter == ball}
        letters = {option[0] for option in options if option[3:] in right}
        assert letters and row["solution"] == f"<answer>{','.join(sorted(letters))}</answer>"
    kinds = {(row["asked"][0], row["asked"][1], row["solution"].count(",")) for _, row in ROWS}
    assert len(kinds) == 2 * 2 * 3  # one to three right answers, of either ball, on either side


def test_targets_see_right_and_decide_by_the_last_look():
    rng, named = np.random.default_rng(0), {True: [], False: []}
    for _, row in ROWS:
        text = events.imperfect_target(row, rng)
        assert format_reward(text) == 1.0
        looks = text.partition(". ")[2].partition("</think>")[0].split(" Let me look again. ")
        for told in looks:
            moments = re.findall(r"\w+ (\w+) (\w+), (\w+) (\w+) (\w+): (\w+)[.]", told)
            for event, (*seen, word) in zip(row["events"], moments, strict=True):
                same = [asked == x for asked, x in zip(row["asked"], event[::2], strict=False)]
                is_ball, is_when = ("yes" if x else "no" for x in same)
                assert seen == [event[0], is_ball, *event[1:], is_when]
                assert word in ("no", events.LETTERS[event[1]])
                if told is not looks[-1]:  # the last must name one, so its rates are higher
                    named[all(same)].append(word != "no")
        assert text.endswith(f"<answer>{','.join(re.findall(': ([A-E])', looks[-1]))}</answer>")
    assert np.mean(named[True]) == pytest.approx(0.7, abs=0.08)
    assert np.mean(named[False]) == pytest.approx(0.2, abs=0.05)


def test_a_moment_is_one_video_token_and_ten_positions_and_ten_words(tmp_path):
    kind = toy.TOYS["events"]
    records = load_records(toy.write_clips(tmp_path, 0, kind, train=24, test=4)[0], tmp_path)
    tokenizer = toy.toy_tokenizer(records, 0, kind)
    clips = ClipSettings(**{name: kind.defaults[name] for name in toy.CLIP})
    question = Prompter(tokenizer, toy.CHAT_TEMPLATE, Geometry(), clips=clips)(records[0])
    video = question.ids_P == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert question.positions_3P[0][video].diff().tolist() == [10, 10, 10]
    told = " ".join(events.look(record.row, np.random.default_rng(0)) for record in records)
    moments = re.findall(r" \w+ \w+ \w+,[^.]*[.]", told)
    assert {len(ids) for ids in tokenizer(moments).input_ids} == {10} and len(moments) > 50


def test_the_flag_toy(capsys):
    """A toy brings its flags, and is a run of its own; not with a model, nor under any name."""
    cfg = parse_config("--toy events --max_steps 7".split())
    assert (cfg.toy, cfg.max_frames, cfg.max_steps) == ("events", 8, 7)
    assert parse_config([]).toy == "colours"
    with pytest.raises(UserError, match="toy was events, is now colours.*a new run"):
        check_changes(parse_config([]), settings_of(cfg), done=3)
    with pytest.raises(UserError, match="--toy is for runs without --model_name_or_path"):
        parse_config("--toy events --model_name_or_path m --jsonl_path q".split())
    with pytest.raises(SystemExit):
        parse_config(["--toy", "chess"])
    assert "invalid choice: 'chess' (choose from" in capsys.readouterr().err
    assert get_args(get_args(get_type_hints(Config)["toy"])[0]) == tuple(toy.TOYS)
