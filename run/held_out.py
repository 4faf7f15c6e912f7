"""Accuracy on held-out questions before and after training, with two controls.

evaluate   mean rewards of a policy's answers
measure    the four rows of eval.json
Measures   a run's eval.json
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch

import files
from data import Prompter
from files import UserError
from model import ranks
from model.policy import Policy
from records import Record
from rewards import accuracy_reward, format_reward, origin_accuracy_reward
from run.answers import answer
from run.config import Config
from run.decoder import ClipReader
from video import Clip

MEASURES = {"soft": accuracy_reward, "exact": origin_accuracy_reward, "format": format_reward}


def evaluate(
    cfg: Config,
    policy: Policy,
    prompter: Prompter,
    records: list[Record],
    variant: str = "sampled",
    batch_size: int = 32,
) -> dict[str, float]:
    """Soft accuracy, exact accuracy and format reward, each in [0, 1] and averaged over all
    completions, and the number of questions skipped because their clips are unreadable.

    Samples G completions per question as in training, or one if `variant` is "greedy". With "wrong
    video" each question gets another question's clip: the accuracy that remains can be guessed from
    the text. With "shuffled frames" it gets its own clip out of order: the accuracy that remains
    does not depend on the order. Under torchrun each rank takes its share of the questions, and all
    return the overall mean.
    """
    clip_of = np.arange(len(records))
    if variant == "wrong video":  # the next one in a random cycle, so never the record itself
        others = np.random.default_rng([cfg.seed, 0, 0, 3]).permutation(len(records))
        clip_of[others] = np.roll(others, 1)
    elif variant == "shuffled frames":
        prompter = shuffled(prompter, cfg.seed)
    elif variant == "greedy":
        cfg = dataclasses.replace(cfg, temperature=0.0, num_generations=1)
    asked = [
        (records[k], records[clip_of[k]], (cfg.seed, k, 0, 2))  # 2: no other stream uses it
        for k in range(ranks.rank(), len(records), ranks.world())
    ]
    scores, skipped = [], len(asked)
    for group in answer(cfg, policy, prompter, asked, batch_size, label=f"evaluating ({variant})"):
        truth = group.question.record.solution
        scores += [[score(text, truth) for score in MEASURES.values()] for text in group.texts]
        skipped -= 1
    everyones, skipped = zip(*ranks.gather((scores, skipped)), strict=True)
    scores = [row for rows in everyones for row in rows]
    if not scores:
        raise UserError(f"none of the {len(records)} clips to evaluate on can be read")
    means = np.mean(scores, axis=0).tolist()
    return dict(zip(MEASURES, means, strict=True)) | {"skipped": sum(skipped)}


def shuffled(prompter: Prompter, seed: int) -> Prompter:
    """A prompter that shuffles the temporal patches (two frames each) of its clips, seeded by
    `seed` and the file name. Each patch stays whole, and if there are several, none keeps its
    place."""

    def load(path: str | os.PathLike, *settings) -> Clip:
        clip = prompter.load_clip(path, *settings)
        patches = clip.frames.unflatten(0, (-1, prompter.geometry.temporal_patch_size))
        cycle = np.random.default_rng([seed, *Path(path).name.encode()]).permutation(len(patches))
        frames = torch.empty_like(patches)
        frames[torch.from_numpy(cycle)] = patches[torch.from_numpy(np.roll(cycle, 1))]
        return dataclasses.replace(clip, frames=frames.flatten(0, 1))

    return dataclasses.replace(prompter, load_clip=load)


def measure(cfg: Config, policy: Policy, prompter: Prompter, records: list[Record]) -> dict:
    """Accuracy sampled, greedy, and sampled with the wrong video or with shuffled frames."""
    variants = ["sampled", "greedy", "wrong video", "shuffled frames"]
    if len(records) == 1:  # no other video to show
        variants.remove("wrong video")
    with policy.gathered() as actor, ClipReader(cfg.clip_timeout) as reader:
        prompter = dataclasses.replace(prompter, load_clip=reader.load_clip)
        return {name: evaluate(cfg, actor, prompter, records, name) for name in variants}


class Measures:
    """A run's eval.json: measurements before and after training. Raises UserError if that of a
    resumed run is damaged."""

    def __init__(self, directory: Path, resumed: bool):
        self.path = directory / "eval.json"
        remedy = "remove it, and what it held is measured once more"
        is_there = resumed and ranks.on_first(self.path.exists)
        self.rows = ranks.on_first(files.read_json, self.path, remedy) if is_there else {}

    def take(self, when: str, step: int, *measured) -> None:
        """Measures the policy `when` ("before" or "after" training), unless eval.json has that for
        this step already. `measured`: the arguments of `measure`."""
        if self.rows.get(f"{when}_step") != step:
            self.rows |= {f"{when}_step": step, when: measure(*measured)}
            ranks.on_first(files.write_json, self.path, self.rows)

    def print(self, count: int) -> None:
        """Prints the table at the end of a run, with a dash for what was not measured before."""
        print(f"\n{count} held-out questions    soft accuracy     exact accuracy    format")
        print(f"{'':20}" + "    before   after" * 3)
        for name, after in self.rows["after"].items():
            before = self.rows.get("before", {}).get(name)
            old = [f"{before[key]:.3f}" if before else "-" for key in MEASURES]
            pairs = zip(old, [after[key] for key in MEASURES], strict=True)
            print(f"{name:20}" + "".join(f"    {a:>6}  {b:6.3f}" for a, b in pairs))
