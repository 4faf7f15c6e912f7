"""What the token weights react to: w_t over position, by three forms of D_t, on ragged groups.

    python -m benchmarks.weights                            # synthetic rows, V = 152064: minutes
    python -m benchmarks.weights --toy runs/toy             # and the toy's own completions
    python -m benchmarks.weights --plot_only                # the figure again, from the JSON

Synthetic rows: G = 8 completions of 25 to 60 tokens. Every position has logits that the group
shares, and each completion adds its own part and its own favourite word: a spread of `scale` nats
and a peak that gives the favourite a probability of roughly 0.3 to 0.99. How much the completions
have in common is drawn anew for each position, from nearly all to nearly nothing, and position 0
is the row they all share, the prompt's last. These are not a language model's logits; the sweep
over scales is there to show what does not hang on their shape.

Toy: G = 8 completions of each of its first questions, sampled from the model before training, and
weighed by every form.

The figure and docs/equations.md's table come from the JSON this writes (benchmarks/weights.json).
"""

import argparse
import json
import time
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

import toy
from benchmarks.origin import provenance
from data import Prompter
from kernels import tw_grpo_head
from kernels.reference import group_divergence, token_weights
from model.policy import Policy
from records import load_records

HERE = Path(__file__).resolve().parent
FORMS = {  # name: (divergence, ended_rows)
    "official": ("official", "uniform"),
    "official, ended excluded": ("official", "exclude"),
    "textbook": ("textbook", "uniform"),
}
COLOURS = {
    "official": "#D55E00",
    "official, ended excluded": "#E69F00",
    "textbook": "#0072B2",
}
LENGTHS = [60, 52, 47, 43, 38, 34, 29, 25]
ALPHA = 1.7
SCALES = (1.0, 2.0, 3.0)


def synthetic_rows(t: int, G: int, V: int, scale: float, seed: int) -> Tensor:
    """log p of the G completions at position t: (G, V), nats. Position 0 is one row, G times."""
    generator = torch.Generator().manual_seed(seed * 100_003 + t)
    shared_1V = torch.randn(1, V, generator=generator)
    own_GV = torch.randn(G, V, generator=generator)
    own = 0.0 if t == 0 else float(torch.rand((), generator=generator))  # share of its own part
    logits_GV = scale * ((1 - own) ** 0.5 * shared_1V + own**0.5 * own_GV)
    # The favourite: the group's, or with probability `own` one of its own.
    favourite_G = torch.randint(V, (1,), generator=generator).expand(G).clone()
    strays_G = torch.rand(G, generator=generator) < own
    favourite_G[strays_G] = torch.randint(V, (G,), generator=generator)[strays_G]
    odds = torch.empty(1).uniform_(-1, 5, generator=generator)  # nats against all other words
    others_G = logits_GV.logsumexp(-1)
    logits_GV[torch.arange(G), favourite_G] = others_G + odds
    return logits_GV.log_softmax(-1)


def synthetic_group(V: int, scale: float, seed: int, lengths: list[int]) -> dict:
    """D_t and w_t of one synthetic group by every form; a position at a time, so G x V floats."""
    lengths_G, T = torch.tensor(lengths), max(lengths)
    divergence = {name: [] for name in FORMS}
    for t in range(T):
        rows_G1V = synthetic_rows(t, len(lengths), V, scale, seed)[:, None]
        alive_G = (lengths_G > t).long()  # at this position, a completion is 1 long or 0
        for name, (form, ended_rows) in FORMS.items():
            divergence[name].append(group_divergence(rows_G1V, alive_G, form, ended_rows).item())
    weights = {n: token_weights(torch.tensor(d), ALPHA).tolist() for n, d in divergence.items()}
    alive = [sum(t < length for length in lengths) for t in range(T)]
    return dict(scale=scale, seed=seed, alive=alive, divergence=divergence, weights=weights)


def toy_groups(run: Path, steps: int) -> list[dict]:
    """A group of each of the first questions, from the toy model before its training, weighed by
    every form."""
    policy = Policy.load(run / "toy" / "model")
    prompter = Prompter(policy.tokenizer, policy.chat_template, policy.geometry, **toy.CLIP)
    groups = []
    for step, row in enumerate(load_records(run / "toy" / "train.jsonl", run / "toy")[:steps], 1):
        question = prompter(row)
        with torch.no_grad():
            features = policy.encode_videos([question])
            (group,) = policy.rollout(
                [question],
                features,
                8,
                toy.DEFAULTS["max_completion_length"],
                1.0,
                [(0, step, 0, 1)],
            )
            (hidden_ND,) = policy.hidden_states([group], features)
        alive = [int((group.lengths_G > t).sum()) for t in range(group.lengths_G.max())]
        heads = {
            name: tw_grpo_head(
                hidden_ND, policy.head_VD, group.targets_N, group.lengths_G, torch.zeros(8),
                divergence=form, ended_rows=ended_rows, alpha=ALPHA,
            )
            for name, (form, ended_rows) in FORMS.items()
        }  # fmt: skip
        groups.append(
            dict(
                step=step,
                alive=alive,
                divergence={name: head.divergence_T.tolist() for name, head in heads.items()},
                weights={name: head.weights_T.tolist() for name, head in heads.items()},
            )
        )
    return groups


def summary(groups: list[dict]) -> dict:
    """By form, over several groups: w_t where all are alive (from t = 1 on: position 0 is one
    shared row), where one to half of them are, and the ratio of the mean D_t of the two."""
    out = {}
    for name in FORMS:
        weights, tails, last, ratios = [], [], [], []
        for group in groups:
            G, w, D = group["alive"][0], group["weights"][name], group["divergence"][name]
            full = [t for t, alive in enumerate(group["alive"]) if alive == G][1:]
            late = [t for t, alive in enumerate(group["alive"]) if alive <= G / 2]
            if not full or not late:
                continue
            weights += [w[t] for t in full]
            tails += [w[t] for t in late]
            last.append(w[-1])
            live, dead = (fmean(D[t] for t in positions) for positions in (full, late))
            ratios.append(dead / live if live > 0 else float("inf"))
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


def plot(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    panels = [(f"synthetic, V = {result['V']:,}, scale {g['scale']:g}", g)
              for g in result["synthetic"]["groups"] if g["seed"] == 0]  # fmt: skip
    if "toy" in result:
        shown = max(result["toy"]["groups"], key=lambda g: len(g["alive"]) - g["alive"].count(8))
        panels.append((f"toy completions, step {shown['step']}", shown))
    figure = Figure(figsize=(3.4 * len(panels), 5.2), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex="col", height_ratios=[3, 1], squeeze=False)
    for (title, group), (upper, lower) in zip(panels, axes.T, strict=True):
        for name in FORMS:
            upper.plot(group["weights"][name], color=COLOURS[name], label=name, linewidth=1.4)
        upper.set_title(title, fontsize=9)
        upper.set_ylim(0.97, ALPHA + 0.03)
        upper.grid(alpha=0.3)
        lower.fill_between(range(len(group["alive"])), group["alive"], step="mid", color="#999999")
        lower.set_ylim(0, max(group["alive"]) * 1.1)
        lower.set_xlabel("position t")
        lower.grid(alpha=0.3)
    axes[0, 0].set_ylabel("token weight w_t")
    axes[1, 0].set_ylabel("alive")
    lines, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(names), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(result: dict) -> str:
    """The summary as docs/equations.md shows it."""
    lines = [
        "| rows | form of D_t | w, all alive: mean | largest | w, half or fewer alive: mean "
        "| largest | w, last position | D, half or fewer / all alive |",
        "|---|---|---|---|---|---|---|---|",
    ]
    blocks = [(f"synthetic, scale {s}", b) for s, b in result["synthetic"]["summary"].items()]
    blocks += [("toy completions", result["toy"]["summary"])] if "toy" in result else []
    for label, block in blocks:
        for name, x in block.items():
            w = [x["all_alive_mean"], x["all_alive_max"], x["half_or_fewer_mean"],
                 x["half_or_fewer_max"], x["last_position_mean"]]  # fmt: skip
            cells = [*(f"{value:.3f}" for value in w), f"{x['divergence_ratio']:.2f}"]
            lines.append(f"| {label} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rounded(value, digits: int = 5):
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    top.add_argument("--vocabulary", type=int, default=152064, help="V of the synthetic rows")
    top.add_argument("--seeds", type=int, default=2, help="synthetic groups of each scale")
    top.add_argument("--toy", help="a finished run of the toy, for its model and questions")
    top.add_argument("--steps", type=int, default=20, help="groups of the toy")
    top.add_argument("--json", default=str(HERE / "weights.json"))
    top.add_argument("--plot", default=str(HERE.parent / "docs" / "weights.png"))
    top.add_argument("--plot_only", action="store_true", help="read the JSON, draw the figure")
    return top


def main() -> None:
    args = parser().parse_args()
    if not args.plot_only:
        start = time.perf_counter()
        groups = [
            synthetic_group(args.vocabulary, scale, seed, LENGTHS)
            for scale in SCALES
            for seed in range(args.seeds)
        ]
        result = provenance() | dict(
            alpha=ALPHA,
            V=args.vocabulary,
            lengths=LENGTHS,
            synthetic=dict(
                summary={f"{s:g}": summary([g for g in groups if g["scale"] == s]) for s in SCALES},
                groups=groups,
            ),
        )
        if args.toy:
            groups = toy_groups(Path(args.toy), args.steps)
            result["toy"] = dict(summary=summary(groups), groups=groups)
        result["seconds"] = time.perf_counter() - start
        Path(args.json).write_text(json.dumps(rounded(result)) + "\n", encoding="utf-8")
    result = json.loads(Path(args.json).read_text(encoding="utf-8"))
    plot(result, Path(args.plot))
    print(table(result))


if __name__ == "__main__":
    main()
