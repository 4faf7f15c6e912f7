"""Deviations of docs/deviations.md that no other file tests; each test has its row there."""

import dataclasses
import json
import re

import pytest
from conftest import PROJECT

from tools import score


@pytest.mark.slow
def test_a_prompt_longer_than_4096_tokens_is_kept_whole(prompter, records, policy):
    # OFFICIAL: cut from the left, video tokens included.  OURS: never cut; refused by default.
    short = prompter(records[0])
    prompter.max_prompt_length = 8192
    long = prompter(dataclasses.replace(records[0], problem=records[0].problem + " red" * 6000))
    video_id = policy.model.config.video_token_id
    assert len(long.ids_P) > 4096 + len(short.ids_P)
    assert (long.ids_P == video_id).sum() == (short.ids_P == video_id).sum() > 0
    first = short.ids_P.tolist().index(video_id)
    assert long.ids_P[:first].tolist() == short.ids_P[:first].tolist()
    assert long.positions_3P.shape[1] == len(long.ids_P)


def test_no_setting_of_a_clip_comes_from_the_environment():
    # OFFICIAL: set in the environment after the reader has read it.  OURS: arguments only.
    for name in ("video.py", "data.py", "run/decoder.py"):
        assert not re.search("environ|getenv", (PROJECT / name).read_text(encoding="utf-8")), name


def test_overall_covers_every_row_of_a_log(tmp_path):
    # OFFICIAL: the CLEVRER evaluator's "overall" is its last batch.  OURS: all rows.
    rows = [
        dict(
            question={"id": k},
            ground_truth="<answer>A,B</answer>" if k % 2 else "<answer>A</answer>",
            model_output="<think></think><answer>A</answer>",
        )
        for k in range(37)
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    shares = score.summarize(score.read_log(path)).shares
    assert shares["overall"].questions == 37 and shares["single"].questions == 19
    assert shares["overall"].strict * 37 / 100 == pytest.approx(19)
    assert shares["overall"].soft * 37 / 100 == pytest.approx(19 + 18 / 2)
