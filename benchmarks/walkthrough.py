"""The group that docs/walkthrough.md follows, from a run of the toy: walkthrough.npz and .png.

    python twgrpo.py --seed 42
    python -m benchmarks.walkthrough runs/toy

Samples G = 4 completions of one question from the model before training, and keeps what cannot be
recomputed without that model. tests/test_walkthrough.py recomputes the rest. Nothing is trained.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import toy
from benchmarks import origin
from data import Prompter
from files import UserError
from model.policy import Policy
from records import load_records
from video import VideoError

QUESTION = "train-170"
SEED = (42, 0, 0, 1)  # as (seed, step, slot, 1) in training, whose steps start at 1
G, T = 4, toy.DEFAULTS["max_completion_length"]


def collect(run: Path) -> dict:
    """What the .npz holds; letters as in `kernels/reference.py`, P prompt tokens, F frames."""
    policy = Policy.load(run / "toy" / "model")
    prompter = Prompter(policy.tokenizer, policy.chat_template, policy.geometry, **toy.CLIP)
    records = {r.id: r for r in load_records(run / "toy" / "train.jsonl", run / "toy")}
    if QUESTION not in records:
        raise UserError(f"{run}/toy/train.jsonl has no question {QUESTION}; give a run of the toy")
    clip = prompter.load_clip(*prompter.clip_arguments(records[QUESTION]))
    question = prompter.question(records[QUESTION], clip)
    with torch.no_grad():
        features = policy.encode_videos([question])
        (group,) = policy.rollout([question], features, G, T, temperature=1.0, seeds=[SEED])
        (hidden_ND,) = policy.hidden_states([group], features)
    head_VD = policy.head_VD.detach().numpy()
    return dict(
        id=QUESTION, problem=question.record.problem, solution=question.record.solution,
        frames_F3HW=clip.frames.numpy(), seconds=clip.seconds, ids_P=question.ids_P.numpy(),
        video_token_id=policy.model.config.video_token_id, end_token_id=policy.pad_id,
        words_V=[policy.tokenizer.decode([v]) for v in range(len(head_VD))],
        lengths_G=group.lengths_G.numpy(), targets_N=group.targets_N.numpy(), seed=SEED,
        banned_V=policy.banned_V.numpy(), max_completion_length=T, hidden_ND=hidden_ND.numpy(),
        head_VD=head_VD, origin=json.dumps(origin.provenance()),
    )  # fmt: skip


def picture(frames_F3HW: np.ndarray, size: int = 168, gap: int = 6) -> Image.Image:
    """The frames in a row, those of a temporal patch closer together; lines where tokens meet."""
    lefts = [k * (size + gap) + k // 2 * 2 * gap for k in range(len(frames_F3HW))]
    row = Image.new("RGB", (lefts[-1] + size, size), "white")
    for x, frame in zip(lefts, frames_F3HW, strict=True):
        image = Image.fromarray(frame.transpose(1, 2, 0)).resize((size, size), Image.NEAREST)
        row.paste(image, (x, 0))
        for line in ((x + size // 2, 0, x + size // 2, size), (x, size // 2, x + size, size // 2)):
            ImageDraw.Draw(row).line(line, "grey")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run of the toy")
    parser.add_argument("--out", type=Path, default=origin.PROJECT / "docs", help="a directory")
    args = parser.parse_args()
    try:
        data = collect(args.run)
        np.savez_compressed(args.out / "walkthrough.npz", **data)
        picture(data["frames_F3HW"]).save(args.out / "walkthrough.png")
    except (UserError, VideoError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
