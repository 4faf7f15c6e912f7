"""What the token weights react to: w_t over position for three forms of D_t, on ragged groups.

    python -m benchmarks.weights runs/toy

The argument is a toy run, for its model and questions. README.md describes the groups. Writes
weights.json and docs/weights.png, and prints the table in docs/equations.md.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks import walkthrough
from benchmarks.origin import PROJECT, provenance
from kernels.reference import group_divergence, token_weights, vocab_logps

FORMS = {  # name: divergence, ended_rows
    "official": ("official", "uniform"),
    "official, ended excluded": ("official", "exclude"),
    "textbook": ("textbook", "uniform"),
}
JSON, PLOT = PROJECT / "benchmarks" / "weights.json", PROJECT / "docs" / "weights.png"
V, SEEDS = 152064, 3  # of the synthetic groups; SEEDS groups per scale
LENGTHS = [60, 52, 47, 43, 38, 34, 29, 25]
ALPHA = 1.7
SCALES = (1.0, 2.0, 3.0)
COLUMNS = "all_alive_mean all_alive_max half_or_fewer_mean half_or_fewer_max last_position_mean"
HEAD = """\
| rows | form of D_t | w, all alive: mean | largest | w, half or fewer alive: mean \
| largest | w, last position | D, half or fewer / all alive |
|---|---|---|---|---|---|---|---|
"""


def synthetic_rows(t: int, G: int, V: int, scale: float, seed: int) -> Tensor:
    """log p of the G completions at position t: (G, V), nats. At position 0 all rows are equal."""
    generator = torch.Generator().manual_seed(seed * 100_003 + t)
    shared_1V = torch.randn(1, V, generator=generator)
    own_GV = torch.randn(G, V, generator=generator)
    own = 0.0 if t == 0 else float(torch.rand((), generator=generator))  # share of the own part
    logits_GV = scale * ((1 - own) ** 0.5 * shared_1V + own**0.5 * own_GV)
    # The favourite: the group's, or with probability `own` one of its own.
    favourite_G = torch.randint(V, (1,), generator=generator).expand(G).clone()
    strays_G = torch.rand(G, generator=generator) < own
    favourite_G[strays_G] = torch.randint(V, (G,), generator=generator)[strays_G]
    odds = torch.empty(1).uniform_(-1, 5, generator=generator)  # nats against all other words
    others_G = logits_GV.logsumexp(-1)
    logits_GV[torch.arange(G), favourite_G] = others_G + odds
    return logits_GV.log_softmax(-1)


def weighed(rows_GTV: Tensor, lengths_G: Tensor) -> dict:
    """How many completions are alive at each position, and D_t and w_t for every form."""
    alive = [int((lengths_G > t).sum()) for t in range(rows_GTV.shape[1])]
    group = dict(alive=alive, divergence={}, weights={})
    for name, options in FORMS.items():
        divergence_T = group_divergence(rows_GTV, lengths_G, *options)
        group["divergence"][name] = divergence_T.tolist()
        group["weights"][name] = token_weights(divergence_T, ALPHA).tolist()
    return group


def synthetic_group(V: int, scale: float, seed: int) -> dict:
    rows = [synthetic_rows(t, len(LENGTHS), V, scale, seed) for t in range(max(LENGTHS))]
    return dict(scale=scale, seed=seed) | weighed(torch.stack(rows, dim=1), torch.tensor(LENGTHS))


def toy_groups(run: Path, steps: int) -> list[dict]:
    """A group of each of the first questions, from the toy model before its training."""
    policy, prompter, records = walkthrough.load(run)
    groups = []
    for step, record in enumerate(records[:steps], 1):
        group, hidden_ND = walkthrough.sample(policy, prompter(record), 8, (0, step, 0, 1))
        logps_NV = vocab_logps(hidden_ND, policy.head_VD.detach())
        rows_GTV = pad_sequence(logps_NV.split(group.lengths_G.tolist()), batch_first=True)
        groups.append(dict(step=step) | weighed(rows_GTV, group.lengths_G))
    return groups


def summary(groups: list[dict]) -> dict:
    """For each form, over several groups: w_t where all are alive (from t = 1 on, since position 0
    is a shared row), w_t where one to half of them are, and the ratio of the two mean D_t."""
    out = {}
    for name in FORMS:
        weights, tails, last, ratios = [], [], [], []
        for group in groups:
            w, D, alive = group["weights"][name], group["divergence"][name], group["alive"]
            full = [t for t, count in enumerate(alive) if count == alive[0]][1:]
            late = [t for t, count in enumerate(alive) if count <= alive[0] / 2]
            if full and late:
                weights += [w[t] for t in full]
                tails += [w[t] for t in late]
                last.append(w[-1])
                ratios.append(fmean(D[t] for t in late) / fmean(D[t] for t in full))
        out[name] = dict(
            groups=len(last),
            all_alive_mean=fmean(weights),
            all_alive_max=max(weights),
            half_or_fewer_mean=fmean(tails),
            half_or_fewer_max=max(tails),
            last_position_mean=fmean(last),
            divergence_ratio=fmean(ratios),
        )
    return out


def plot(result: dict) -> None:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    groups = [group for group in result["synthetic"]["groups"] if group["seed"] == 0]
    panels = [(f"synthetic, V = {V:,}, scale {g['scale']:g}", g) for g in groups]
    longest = max(result["toy"]["groups"], key=lambda g: len(g["alive"]) - g["alive"].count(8))
    panels.append((f"toy completions, step {longest['step']}", longest))
    figure = Figure(figsize=(3.4 * len(panels), 5.2), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex="col", sharey="row", height_ratios=[3, 1])
    for (title, group), (upper, lower) in zip(panels, axes.T, strict=True):
        for name in FORMS:
            upper.plot(group["weights"][name], label=name)
        upper.set_title(title, fontsize=9)
        lower.fill_between(range(len(group["alive"])), group["alive"], step="mid", color="0.6")
        lower.set_xlabel("position t")
    axes[0, 0].set_ylabel("token weight w_t")
    axes[1, 0].set_ylabel("alive")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(PLOT, dpi=110)


def table(result: dict) -> str:
    """The summary as a table for docs/equations.md."""
    blocks = {f"synthetic, scale {s}": b for s, b in result["synthetic"]["summary"].items()}
    blocks["toy completions"] = result["toy"]["summary"]
    lines = []
    for label, block in blocks.items():
        for form, measures in block.items():
            weights = " | ".join(f"{measures[name]:.3f}" for name in COLUMNS.split())
            lines.append(f"| {label} | {form} | {weights} | {measures['divergence_ratio']:.2f} |")
    return HEAD + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run of the toy")
    run, start = parser.parse_args().run, time.perf_counter()
    groups = {s: [synthetic_group(V, s, k) for k in range(SEEDS)] for s in SCALES}
    summaries = {f"{scale:g}": summary(groups[scale]) for scale in SCALES}
    of_toy = toy_groups(run, 20)
    result = provenance() | dict(
        alpha=ALPHA,
        V=V,
        lengths=LENGTHS,
        synthetic=dict(summary=summaries, groups=sum(groups.values(), [])),
        toy=dict(summary=summary(of_toy), groups=of_toy),
        seconds=time.perf_counter() - start,
    )
    text = json.dumps(result)
    result = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.5g}"))
    JSON.write_text(json.dumps(result) + "\n", encoding="utf-8")
    plot(result)
    print(table(result))


if __name__ == "__main__":
    main()
