"""Accuracy on held-out questions, before and after training, with the wrong video as a control.

evaluate          mean rewards of a policy's answers to some questions
measure           the three rows of eval.json
read_measures, write_measures, print_measures
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import files
from data import Prompter
from files import UserError
from model import ranks
from model.policy import Policy
from records import Record, printable
from rewards import accuracy_reward, format_reward, origin_accuracy_reward
from run.config import Config
from run.decoder import ClipReader
from video import VideoError

MEASURES = {"soft": accuracy_reward, "exact": origin_accuracy_reward, "format": format_reward}


@torch.no_grad()
def evaluate(
    policy: Policy,
    prompter: Prompter,
    records: list[Record],
    *,
    temperature: float,
    num_generations: int = 1,
    max_completion_length: int,
    batch_size: int = 32,
    seed: int = 0,
    wrong_video: bool = False,
) -> dict[str, float]:
    """Mean over all completions of the soft accuracy, the exact accuracy and the format reward,
    each in [0, 1].

    temperature 0 is greedy (num_generations is then 1). With wrong_video every question is shown
    the clip of another one: what is left of the accuracy is what can be guessed from the text.
    Questions whose clip cannot be read are left out and counted in "skipped". Under torchrun every
    rank takes its share of the questions, and all return the mean over all of them.
    """
    if wrong_video and len(records) < 2:
        raise UserError("a wrong video needs a second question to take it from")
    others = np.random.default_rng([seed, 0, 0, 3]).permutation(len(records))
    # The next one of a random cycle through all records: never the record itself.
    clip_of = {int(a): records[b] for a, b in zip(others, np.roll(others, 1), strict=True)}
    mine, scores, skipped = range(ranks.rank(), len(records), ranks.world()), [], 0
    label = ("greedy" if temperature == 0 else "sampled") + (", wrong video" if wrong_video else "")
    bar = range(0, len(mine), batch_size)
    if ranks.is_main():
        bar = tqdm(bar, desc=f"evaluating ({label})", leave=False)
    for start in bar:
        questions, seeds = [], []
        for k in mine[start : start + batch_size]:
            try:
                questions.append(prompter(records[k], clip_of[k] if wrong_video else None))
                seeds.append((seed, k, 0, 2))  # 2: no other stream ends so
            except VideoError as error:
                skipped += 1
                note = printable(f"left out question {records[k].id}: {error}")
                tqdm.write(note, file=sys.stderr)
        if not questions:
            continue
        G = num_generations if temperature > 0 else 1
        features = policy.encode_videos(questions)
        groups = policy.rollout(questions, features, G, max_completion_length, temperature, seeds)
        for group in groups:
            truth = group.question.record.solution
            scores += [
                [measure(text, truth) for measure in MEASURES.values()] for text in group.texts
            ]
    everyones, skips = zip(*ranks.gather((scores, skipped)), strict=True)
    scores, skipped = [row for rows in everyones for row in rows], sum(skips)
    if not scores:
        raise UserError(f"none of the {len(records)} clips to evaluate on can be read")
    means = np.mean(scores, axis=0)
    return dict(zip(MEASURES, means.tolist(), strict=True)) | {"skipped": skipped}


def measure(cfg: Config, policy: Policy, prompter: Prompter, records: list[Record]) -> dict:
    """Sampled and greedy accuracy, and sampled with the wrong video as a control."""
    common = dict(max_completion_length=cfg.max_completion_length, seed=cfg.seed)
    sampled = dict(temperature=cfg.temperature, num_generations=cfg.num_generations, **common)
    with policy.gathered() as actor, ClipReader(cfg.clip_timeout) as reader:
        prompter = dataclasses.replace(prompter, load_clip=reader.load_clip)
        measures = {
            "sampled": evaluate(actor, prompter, records, **sampled),
            "greedy": evaluate(actor, prompter, records, temperature=0.0, **common),
        }
        if len(records) > 1:
            measures["wrong video"] = evaluate(
                actor, prompter, records, wrong_video=True, **sampled
            )
        return measures


def read_measures(path: Path) -> dict:
    """eval.json as far as there is one. Raises UserError if it is damaged."""
    remedy = "remove it, and what it held is measured once more"
    measures = files.read_json(path, remedy) if path.exists() else {}
    try:
        for name in measures.keys() & {"before", "after"}:
            for row in measures[name].values():
                [float(row[key]) for key in ("soft", "exact", "format")]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not the eval.json of a run; {remedy}") from None
    return measures


def write_measures(path: Path, measures: dict) -> None:
    with files.replacing(path) as beside:
        beside.write_text(json.dumps(measures, indent=2) + "\n", encoding="utf-8")


def print_measures(before: dict, after: dict, count: int) -> None:
    print(f"\n{count} held-out questions    soft accuracy     exact accuracy    format")
    print(f"{'':20}" + "    before   after" * 3)
    for name in before:
        pairs = [(before[name][key], after[name][key]) for key in ("soft", "exact", "format")]
        print(f"{name:20}" + "".join(f"    {a:6.3f}  {b:6.3f}" for a, b in pairs))
