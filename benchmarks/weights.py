"""What the token weights react to: w_t over position for three forms of D_t, on ragged groups.

    python -m benchmarks.weights runs/toy

The argument is a toy run, for its model and questions. README.md describes the groups. Writes
weights.json and docs/weights.png, and prints the table in docs/equations.md.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks import walkthrough
from benchmarks.origin import PROJECT, provenance, table
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
SCALES = (1, 2, 3)


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


def measured(rows_GTV: Tensor, lengths_G: Tensor) -> dict:
    """How many completions are alive at each position, and D_t in every form, in 5 digits."""
    alive_T = (torch.arange(rows_GTV.shape[1]) < lengths_G[:, None]).sum(0)
    group = dict(alive=alive_T.tolist(), divergence={})
    for name, options in FORMS.items():
        divergence_T = group_divergence(rows_GTV, lengths_G, *options)
        group["divergence"][name] = [float(f"{x:.5g}") for x in divergence_T]
    return group


def synthetic_group(V: int, scale: float, seed: int) -> dict:
    rows = [synthetic_rows(t, len(LENGTHS), V, scale, seed) for t in range(max(LENGTHS))]
    return measured(torch.stack(rows, dim=1), torch.tensor(LENGTHS))


def toy_groups(run: Path, steps: int) -> list[dict]:
    """A group of each of the first questions, from the toy model before its training."""
    policy, prompter, records = walkthrough.load(run)
    groups = []
    for step, record in enumerate(records[:steps], 1):
        group, hidden_ND = walkthrough.sample(policy, prompter(record), 8, (0, step, 0, 1))
        logps_NV = vocab_logps(hidden_ND, policy.head_VD.detach())
        rows_GTV = pad_sequence(logps_NV.split(group.lengths_G.tolist()), batch_first=True)
        groups.append(measured(rows_GTV, group.lengths_G))
    return groups


def weights(group: dict, form: str) -> Tensor:
    return token_weights(torch.tensor(group["divergence"][form]), ALPHA)


def summary(groups: list[dict], form: str) -> dict:
    """A row of the table in docs/equations.md: w_t where all are alive (from t = 1 on, since
    position 0 is a shared row), w_t where half or fewer are, and the ratio of the two mean D_t.
    Leaves out groups that have no position with half or fewer alive."""
    full, late, ratios = [], [], []
    for group in groups:
        alive_T, w_T = torch.tensor(group["alive"]), weights(group, form)
        D_T, t_T = torch.tensor(group["divergence"][form]), torch.arange(len(w_T))
        is_full_T, is_late_T = (alive_T == alive_T[0]) & (t_T > 0), alive_T <= alive_T[0] / 2
        if is_late_T.any():
            full.append(w_T[is_full_T])
            late.append(w_T[is_late_T])
            ratios.append(D_T[is_late_T].mean() / D_T[is_full_T].mean())
    columns = {
        "w, all alive: mean": torch.cat(full).mean(),
        "w, all alive: largest": torch.cat(full).max(),
        "w, half or fewer alive: mean": torch.cat(late).mean(),
        "w, half or fewer alive: largest": torch.cat(late).max(),
        "w, last position": sum(w_T[-1] for w_T in late) / len(late),
    }
    shown = {name: f"{value:.3f}" for name, value in columns.items()}
    ratio = {"D, half or fewer / all alive": (sum(ratios) / len(ratios)).item()}
    return dict(groups=len(late)) | shown | ratio


def rows(groups: dict[str, list[dict]]) -> list[dict]:
    """The rows of the table in docs/equations.md."""
    return [
        {"rows": name, "form of D_t": form} | summary(several, form)
        for name, several in groups.items()
        for form in FORMS
    ]


def plot(groups: dict[str, list[dict]]) -> None:
    """Of each kind, the group with the most positions at which a completion has ended."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(3.4 * len(groups), 5.2), layout="constrained")
    axes = figure.subplots(2, len(groups), sharex="col", sharey="row", height_ratios=[3, 1])
    for (name, several), (upper, lower) in zip(groups.items(), axes.T, strict=True):
        group = max(several, key=lambda g: len(g["alive"]) - g["alive"].count(g["alive"][0]))
        for form in FORMS:
            upper.plot(weights(group, form), label=form)
        upper.set_title(name, fontsize=9)
        lower.fill_between(range(len(group["alive"])), group["alive"], step="mid", color="0.6")
        lower.set_xlabel("position t")
    axes[0, 0].set_ylabel("token weight w_t")
    axes[1, 0].set_ylabel("alive")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run of the toy")
    run, start = parser.parse_args().run, time.perf_counter()
    groups = {
        f"synthetic, scale {scale}": [synthetic_group(V, scale, seed) for seed in range(SEEDS)]
        for scale in SCALES
    }
    groups["toy completions"] = toy_groups(run, 20)
    result = provenance() | dict(V=V, lengths=LENGTHS, seconds=time.perf_counter() - start)
    JSON.write_text(json.dumps(result | dict(groups=groups)) + "\n", encoding="utf-8")
    plot(groups)
    print(table(rows(groups)))


if __name__ == "__main__":
    main()
