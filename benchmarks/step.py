"""Times a training step of Qwen2.5-VL with random weights by phase, against the official method.

    python -m benchmarks.step --size 7b --prompt 1100 --completion 170 400 --json step.json
    python -m benchmarks.step --ways ours --completion 64 128 256

Parameters are float32; compute is bf16 on a GPU, float32 on a CPU. The frames are random, so no
codec is needed. README.md says what the two methods do and what a row holds.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

import toy
import twgrpo
from benchmarks.origin import Results, medians, table
from data import TEMPLATES, Prompter, Question
from kernels import reference
from model.packing import ATTENTION
from model.policy import Policy
from model.rollout import Decoder
from records import Record
from run.config import Config
from run.log import peak_memory_gb, phase
from video import Clip

TINY = dict(hidden_size=512, num_hidden_layers=10, num_attention_heads=8, intermediate_size=1408)
TINY |= dict(vision=dict(depth=2, hidden_size=256))
QWEN_7B = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, vocab_size=152064)
QWEN_7B |= dict(num_key_value_heads=4, intermediate_size=18944)
QWEN_7B |= dict(vision=dict(depth=32, hidden_size=1280, num_heads=16))
SIZES = {"tiny": TINY, "7b": QWEN_7B}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(size: str, prompt: int, device: str) -> tuple[Policy, Callable[[], Question], Optimizer]:
    """A model of that size, a maker of questions of about `prompt` tokens, and an optimizer."""
    tokenizer = toy.build_tokenizer(list(TEMPLATES.values()))
    with torch.device(device):
        model = toy.build_model(tokenizer, **SIZES[size]).eval()
    policy = Policy(model, tokenizer, toy.CHAT_TEMPLATE)
    policy.vision.requires_grad_(False)
    policy.eos_ids = torch.tensor([-1])  # every completion runs to its full length
    if size == "7b":
        policy.checkpoint_activations()
    kind = SGD if size == "7b" else AdamW  # AdamW's moments would not fit next to 7B
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-9, fused=True)
    side = 28 * max(2, round(((prompt - 90) / 5) ** 0.5))  # 10 frames: 5 temporal patches
    clip = Clip(torch.randint(255, (10, 3, side, side), dtype=torch.uint8), seconds=0.5)
    prompter = Prompter(tokenizer, toy.CHAT_TEMPLATE, policy.geometry, load_clip=lambda *_: clip)
    record = Record("1", "What?", "<answer>A</answer>", Path("random frames"))
    return policy, lambda: prompter(record), optimizer


def ours(cfg: Config, policy: Policy, question: Question) -> Tensor:
    """Samples a group and returns its loss."""
    (group,) = twgrpo.sample_groups(cfg, policy, [question], [(0, 0, 0, 1)])
    group.advantages_G = torch.linspace(-1, 1, cfg.num_generations)
    loss, _ = twgrpo.score_groups(cfg, policy, [group])
    return loss


def official(cfg: Config, policy: Policy, question: Question) -> Tensor:
    """Samples a group and returns its loss."""
    G, T, device = cfg.num_generations, cfg.max_completion_length, policy.device
    ids = question.ids_P[None].to(device)
    patches, grid = question.patches.to(device), torch.tensor([question.grid], device=device)
    sampling = dict(num_return_sequences=G, do_sample=True, top_k=0, max_new_tokens=T)
    sampling |= dict(min_new_tokens=T, suppress_tokens=policy.banned_V.nonzero()[:, 0].tolist())
    policy.text.eval()
    with phase("rollout"), torch.no_grad(), policy.compute():
        ids_GL = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=2 * (ids == policy.model.config.video_token_id).int(),
            pixel_values_videos=patches,
            video_grid_thw=grid,
            **sampling,
        )
    after = question.positions_3P.max() + 1 + torch.arange(T).expand(3, -1)
    positions_3L = torch.cat([question.positions_3P, after], dim=1).to(device)
    policy.text.train(policy.text.is_gradient_checkpointing)
    with phase("score"):
        with policy.compute():
            logits_GLV = policy.model(
                input_ids=ids_GL,
                position_ids=positions_3L[:, None].expand(-1, G, -1),
                pixel_values_videos=patches.repeat(G, 1),
                video_grid_thw=grid.repeat(G, 1),
            ).logits
        logps_GTV = logits_GLV[:, :-1].log_softmax(-1)[:, -T:]
        logps_N = logps_GTV.gather(2, ids_GL[:, -T:, None]).flatten()
        lengths_G = torch.full((G,), T, device=device)
        advantages_G = torch.linspace(-1, 1, G, device=device)
        divergence_T = reference.group_divergence(logps_GTV, lengths_G)
        inputs = logps_N, divergence_T, lengths_G, advantages_G
        return reference.weighted_loss(*inputs, None, None, reference.LossOptions()).loss


WAYS = dict(ours=ours, official=official)


def measure(way: str, size: str, prompt: int, repeats: int, **flags) -> dict:
    """Prompt tokens, median seconds per phase and per step, and peak memory in GB (1e9 bytes). For
    ours also milliseconds per decoded token, and GB of weights read per second, which memory
    bandwidth limits. `flags` are Config's."""
    cfg = Config(**flags)
    policy, ask, optimizer = build(size, prompt, DEVICE)
    policy.attn_implementation = cfg.attn_implementation

    def step():
        with phase("data"):
            question = ask()
        loss = WAYS[way](cfg, policy, question)
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    with mock.patch.object(Decoder, "run", phase("decode")(Decoder.run)):
        seconds = medians(step, repeats)
    decode = seconds.pop("decode", None)
    row = {f"{name}_s": value for name, value in seconds.items()}
    row |= dict(step_s=sum(row.values()), tokens=len(ask().ids_P))
    if DEVICE == "cuda":  # on a CPU it would be the peak of all measurements so far
        row["peak_gb"] = peak_memory_gb()
    if decode:
        token_s = decode / (cfg.max_completion_length - 1)
        # Decoding a token reads the language model except its embedding. The KV cache of 8 x 400
        # tokens, 1 % of 7B, is ignored.
        read = sum(p.numel() for p in [*policy.text.layers.parameters(), policy.head_VD])
        read_gb_s = read * policy.compute_dtype.itemsize / token_s / 1e9
        row |= dict(decode_ms=1e3 * token_s, read_gb_s=read_gb_s)
    return row


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    top.add_argument("--size", choices=SIZES, default="tiny")
    top.add_argument("--prompt", type=int, default=600, help="approximate prompt tokens")
    top.add_argument("--completion", type=int, nargs="+", default=[64], help="tokens, at least 2")
    top.add_argument("--num_generations", type=int, default=8)
    top.add_argument("--repeats", type=int, default=3)
    top.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    top.add_argument("--json", type=Path, help="write the results to this file, row by row")
    shape = vars(top.parse_args())
    results = Results(shape.pop("json"))
    ways, lengths = shape.pop("ways"), shape.pop("completion")
    for way in ways:
        for attention in ATTENTION if way == "ours" and DEVICE == "cuda" else ["sdpa"]:
            for T in lengths:
                key = dict(way=way, attn_implementation=attention, max_completion_length=T)
                results.measure(measure, **key | shape)
    print(table(results.rows))


if __name__ == "__main__":
    main()
