"""Accuracy on held-out questions, before and after training, with two controls.

evaluate   mean rewards of a policy's answers to some questions
measure    the four rows of eval.json
Measures   eval.json of a run
"""

import dataclasses
import json
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
    """Mean over all completions of the soft accuracy, the exact accuracy and the format reward,
    each in [0, 1], and the number of questions skipped because their clip cannot be read.

    G completions of each question are sampled as in training, or one if `variant` is "greedy".
    With "wrong video" every question is shown the clip of another one: what is left of the accuracy
    can be guessed from the text. With "shuffled frames" its own clip is shown out of order: what is
    left does not need the order. Under torchrun every rank takes its share of the questions, and
    all return the mean over all of them.
    """
    clip_of = np.arange(len(records))
    if variant == "wrong video":  # the next one of a random cycle: never the record itself
        others = np.random.default_rng([cfg.seed, 0, 0, 3]).permutation(len(records))
        clip_of[others] = np.roll(others, 1)
    elif variant == "shuffled frames":
        prompter = shuffled(prompter, cfg.seed)
    elif variant == "greedy":
        cfg = dataclasses.replace(cfg, temperature=0.0, num_generations=1)
    asked = [
        (records[k], records[clip_of[k]], (cfg.seed, k, 0, 2))  # 2: no other stream ends so
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
    """A prompter whose clips have their temporal patches, two frames each, in another order, drawn
    from the seed and the name of the file. Each patch stays whole, and of several none keeps its
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
    """Sampled and greedy accuracy, and sampled with the wrong video and with shuffled frames."""
    variants = ["sampled", "greedy", "wrong video", "shuffled frames"]
    if len(records) == 1:  # there is no other video to show
        variants.remove("wrong video")
    with policy.gathered() as actor, ClipReader(cfg.clip_timeout) as reader:
        prompter = dataclasses.replace(prompter, load_clip=reader.load_clip)
        return {name: evaluate(cfg, actor, prompter, records, name) for name in variants}


class Measures:
    """eval.json of a run: what was measured before and after training. Raises UserError if a
    resumed run's is damaged."""

    def __init__(self, directory: Path, resumed: bool):
        self.path = directory / "eval.json"
        remedy = "remove it, and what it held is measured once more"
        is_there = resumed and ranks.on_first(self.path.exists)
        self.rows = ranks.on_first(files.read_json, self.path, remedy) if is_there else {}

    def before(self, *measured) -> None:
        """Measures the untrained policy, unless that is done; arguments as for `measure`."""
        if "before" not in self.rows:
            self.rows["before"] = measure(*measured)
            ranks.on_first(self._write)

    def after(self, step: int, *measured) -> None:
        if self.rows.get("after_step") != step:
            self.rows |= dict(after_step=step, after=measure(*measured))
            ranks.on_first(self._write)

    def _write(self) -> None:
        with files.replacing(self.path) as beside:
            beside.write_text(json.dumps(self.rows, indent=2) + "\n", encoding="utf-8")

    def print(self, count: int) -> None:
        """The table at the end of a run, with a dash for what was not measured before it."""
        print(f"\n{count} held-out questions    soft accuracy     exact accuracy    format")
        print(f"{'':20}" + "    before   after" * 3)
        for name, after in self.rows["after"].items():
            before = self.rows.get("before", {}).get(name)
            old = [f"{before[key]:.3f}" if before else "-" for key in MEASURES]
            pairs = zip(old, [after[key] for key in MEASURES], strict=True)
            print(f"{name:20}" + "".join(f"    {a:>6}  {b:6.3f}" for a, b in pairs))
