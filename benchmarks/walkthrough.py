"""Makes the group for docs/walkthrough.md from a toy run: walkthrough.npz and walkthrough.png.

    python twgrpo.py --seed 42 && python -m benchmarks.walkthrough runs/toy

Samples G = 4 completions of one question from the model before training. The .npz keeps what cannot
be recomputed without that model; the page computes the rest.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import toy
from benchmarks.origin import PROJECT, provenance
from data import Prompter, Question
from model.packing import Group
from model.policy import Policy
from records import Record, load_records
from video import ClipSettings

QUESTION = 170  # of the training questions
SEED = (42, 0, 0, 1)  # as (seed, step, slot, 1) in training, whose steps start at 1
OUT = PROJECT / "docs"


def load(run: Path) -> tuple[Policy, Prompter, list[Record]]:
    """A toy run's model before training, its prompter and its questions."""
    policy = Policy.load(run / "toy" / "model")
    clips = ClipSettings(**toy.CLIP)
    prompter = Prompter(policy.tokenizer, policy.chat_template, policy.geometry, clips=clips)
    return policy, prompter, load_records(run / "toy" / "train.jsonl", run / "toy")


@torch.no_grad()
def sample(policy: Policy, question: Question, G: int, seed: tuple) -> tuple[Group, Tensor]:
    """G completions of a question, and the hidden states that predict their tokens, (N, D)."""
    features, length = policy.encode_videos([question]), toy.DEFAULTS["max_completion_length"]
    (group,) = policy.rollout([question], features, G, length, temperature=1.0, seeds=[seed])
    return group, policy.hidden_states([group])[0]


def picture(frames_F3HW: np.ndarray, scale: int = 3, gap: int = 6) -> Image.Image:
    """The frames in a row, grouped by temporal patch, with lines between tokens."""
    frames = frames_F3HW.transpose(0, 2, 3, 1).repeat(scale, 1).repeat(scale, 2)
    middle = frames.shape[1] // 2
    frames[:, middle] = frames[:, :, middle] = 128
    gaps = [((0, 0), (0, gap * (1 + k % 2 * 2)), (0, 0)) for k in range(len(frames))]
    row = [np.pad(f, g, constant_values=255) for f, g in zip(frames, gaps, strict=True)]
    return Image.fromarray(np.concatenate(row, axis=1)[:, : -3 * gap])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run of the toy")
    policy, prompter, records = load(parser.parse_args().run)
    record = records[QUESTION]
    question, clip = prompter(record), prompter.load_clip(record.video, prompter.clips)
    group, hidden_ND = sample(policy, question, 4, SEED)
    picture(clip.frames.numpy()).save(OUT / "walkthrough.png")
    np.savez_compressed(  # letters as in kernels/reference.py, P prompt tokens, F frames
        OUT / "walkthrough.npz",
        solution=record.solution,
        frames_F3HW=clip.frames,
        seconds=clip.seconds,
        ids_P=question.ids_P,
        words_V=[policy.tokenizer.decode([v]) for v in range(len(policy.head_VD))],
        banned_V=policy.banned_V,
        lengths_G=group.lengths_G,
        targets_N=group.targets_N,
        hidden_ND=hidden_ND,
        head_VD=policy.head_VD.detach(),
        origin=json.dumps(provenance()),
    )


if __name__ == "__main__":
    main()
