"""How good a policy's answers are on a set of questions: soft and exact accuracy, and the format.

`evaluate` uses the policy's own rollout, so what is measured is what is trained.
"""

import numpy as np
import torch
from tqdm import tqdm

from data import Prompter, Record
from policy import Policy
from rewards import accuracy_reward, format_reward, origin_accuracy_reward
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
    Questions whose clip cannot be read are left out and counted in "skipped".
    """
    others = np.random.default_rng([seed, 3]).permutation(len(records))
    # The next one of a random cycle through all records: never the record itself.
    clip_of = {int(a): records[b] for a, b in zip(others, np.roll(others, 1), strict=True)}
    scores, skipped = [], 0
    label = ("greedy" if temperature == 0 else "sampled") + (", wrong video" if wrong_video else "")
    starts = range(0, len(records), batch_size)
    for start in tqdm(starts, desc=f"evaluating ({label})", leave=False):
        questions, seeds = [], []
        for k in range(start, min(start + batch_size, len(records))):
            try:
                questions.append(prompter(records[k], clip_of[k] if wrong_video else None))
                seeds.append((seed, k))
            except VideoError:
                skipped += 1
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
    means = np.mean(scores, axis=0) if scores else np.full(len(MEASURES), np.nan)
    return dict(zip(MEASURES, means.tolist(), strict=True)) | {"skipped": skipped}
