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

Toy: `twgrpo.py` itself, one untrained step at a time (the learning rate is too small to move a
float32 weight), once per form. Seeds fix the questions and the samples, so the runs look at the
same groups, and what differs in completions.jsonl is the weight alone.

The figure and docs/equations.md's table come from the JSON this writes (benchmarks/weights.json).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.origin import source
from kernels.reference import group_divergence, token_weights

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


def toy_groups(run: Path, steps: int, tmp: Path) -> list[dict]:
    """The first group of each step, weighed by every form, of the toy model before its training."""
    toy = run / "toy"
    rows = {}
    for name, (form, ended_rows) in FORMS.items():
        out = tmp / f"{form}-{ended_rows}"
        subprocess.run(
            [sys.executable, str(HERE.parent / "twgrpo.py"), "--output_dir", str(out),
             "--model_name_or_path", str(toy / "model"), "--jsonl_path", str(toy / "train.jsonl"),
             "--video_root", str(toy), "--divergence", form, "--ended_rows", ended_rows,
             "--alpha", str(ALPHA), "--max_steps", str(steps), "--learning_rate", "1e-30",
             *"--max_frames 4 --min_pixels 3136 --max_pixels 3136 --max_completion_length 20 "
             "--dataloader_num_workers 0 --gradient_checkpointing false".split()],
            check=True, env=dict(os.environ, TQDM_DISABLE="1"), stdout=subprocess.DEVNULL,
        )  # fmt: skip
        lines = (out / "completions.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = [json.loads(line) for line in lines]
    groups = []
    for same in zip(*rows.values(), strict=True):
        lengths = [[len(c["token_ids"]) for c in row["completions"]] for row in same]
        tokens = [[c["token_ids"] for c in row["completions"]] for row in same]
        if any(other != tokens[0] for other in tokens):
            raise RuntimeError(f"step {same[0]['step']}: the runs sampled different completions")
        groups.append(
            dict(
                step=same[0]["step"],
                alive=[sum(t < n for n in lengths[0]) for t in range(max(lengths[0]))],
                divergence={n: r["divergence"] for n, r in zip(rows, same, strict=True)},
                weights={n: r["weights"] for n, r in zip(rows, same, strict=True)},
            )
        )
    return groups


def summary(groups: list[dict]) -> dict:
    """By form, of several groups: w_t where all are alive (from t = 1 on: position 0 is one shared
    row), where one to half of them are, and where most of the weight's range is spent."""
    out = {}
    for name in FORMS:
        all_alive, half, last, ratios, peaks = [], [], [], [], []
        for group in groups:
            G, w, D = group["alive"][0], group["weights"][name], group["divergence"][name]
            alive = [x for x, a in zip(w, group["alive"], strict=True) if a == G][1:]
            tail = [x for x, a in zip(w, group["alive"], strict=True) if a <= G / 2]
            if not alive or not tail:
                continue
            all_alive += alive
            half += tail
            last.append(w[-1])
            peaks.append(max(range(len(w)), key=w.__getitem__) / max(1, len(w) - 1))
            means = [
                [d for d, a in zip(D, group["alive"], strict=True) if test(a)][from_:]
                for test, from_ in ((lambda a, G=G: a == G, 1), (lambda a, G=G: a <= G / 2, 0))
            ]
            live, dead = (sum(x) / len(x) for x in means)
            ratios.append(dead / live if live > 0 else float("inf"))
        count = max(1, len(last))
        out[name] = dict(
            groups=len(last),
            all_alive_min=min(all_alive, default=None),
            all_alive_mean=sum(all_alive) / max(1, len(all_alive)),
            all_alive_max=max(all_alive, default=None),
            half_or_fewer_mean=sum(half) / max(1, len(half)),
            half_or_fewer_max=max(half, default=None),
            last_position_mean=sum(last) / count,
            divergence_ratio=sum(ratios) / count,
            peak_at_fraction_of_length=sum(peaks) / count,
        )
    return out


def plot(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    panels = [(f"synthetic, V = {result['V']:,}, scale {g['scale']:g}", g)
              for g in result["synthetic"]["groups"] if g["seed"] == 0]  # fmt: skip
    if "toy" in result:
        shown = max(result["toy"]["groups"], key=lambda g: len(g["alive"]) - g["alive"].count(8))
        panels.append((f"toy completions, V = {result['toy']['V']}, step {shown['step']}", shown))
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
        result = dict(
            date=datetime.now(UTC).date().isoformat(), torch=torch.__version__,
            commit=source()["commit"],
            device=f"CPU, {torch.get_num_threads()} thread(s)", alpha=ALPHA,
            V=args.vocabulary, lengths=LENGTHS,
            synthetic=dict(
                summary={
                    f"{s:g}": summary([g for g in groups if g["scale"] == s]) for s in SCALES
                },
                groups=groups,
            ),
        )  # fmt: skip
        if args.toy:
            with tempfile.TemporaryDirectory() as tmp:
                toy = toy_groups(Path(args.toy), args.steps, Path(tmp))
            config = json.loads((Path(args.toy) / "toy/model/config.json").read_text())
            V = config.get("text_config", config)["vocab_size"]
            result["toy"] = dict(V=V, summary=summary(toy), groups=toy)
        result["seconds"] = time.perf_counter() - start
        Path(args.json).write_text(json.dumps(rounded(result)) + "\n", encoding="utf-8")
    result = json.loads(Path(args.json).read_text(encoding="utf-8"))
    plot(result, Path(args.plot))
    print(table(result))


if __name__ == "__main__":
    main()
