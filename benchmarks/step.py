"""One training step of Qwen2.5-VL with random weights, phase by phase, against the official way.

    python -m benchmarks.step --size tiny
    python -m benchmarks.step --size 7b --prompt 1100 --completion 170 --json step.json

ours      the video encoded once, the prompt prefilled once, one packed row, the head of `kernels`
official  restated from aa529ff grpo_trainer.py: generate(num_return_sequences=G), which encodes the
          video and prefills the prompt G times, then G padded copies with the logits of every
          position materialised, and the group divergence over their log-softmax

Both sample completions of the same length and take one optimizer step from it; both keep the vision
tower frozen. Seconds are medians over `--repeats`, taken in turn. The model has float32 parameters
and computes in bf16 on a GPU, in float32 on a CPU.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import toy
from benchmarks.origin import source, surroundings
from config import Config, check_attention
from data import TEMPLATES, Prompter, Record
from files import UserError
from kernels import reference
from packing import ATTENTION
from policy import Policy
from twgrpo import question_loss, rewards_of, sample_groups

SIZES = {
    "tiny": dict(hidden_size=512, layers=10, heads=8, kv_heads=2, intermediate_size=1408,
                 vision_depth=2, vision_hidden_size=256),
    "3b": dict(hidden_size=2048, layers=36, heads=16, kv_heads=2, intermediate_size=11008,
               vision_depth=32, vision_hidden_size=1280, vision_heads=16, vocab_size=151936),
    "7b": dict(hidden_size=3584, layers=28, heads=28, kv_heads=4, intermediate_size=18944,
               vision_depth=32, vision_hidden_size=1280, vision_heads=16, vocab_size=152064),
}  # fmt: skip


def build(size: str, prompt: int, device: str) -> tuple[Policy, Prompter, Record]:
    """A model of that size and a clip whose prompt has about `prompt` tokens."""
    tokenizer = toy.build_tokenizer(list(TEMPLATES.values()))
    with torch.device(device):
        model = toy.build_model(tokenizer, **SIZES[size]).eval()
    policy = Policy(model, tokenizer, toy.CHAT_TEMPLATE)
    policy.vision.requires_grad_(False)
    policy.eos_ids = torch.tensor([-1])  # every completion runs to its full length
    side = 28 * max(2, round(((prompt - 90) / 5) ** 0.5))  # 10 frames: 5 temporal patches
    root = Path(tempfile.mkdtemp())
    frames = np.random.default_rng(0).integers(0, 255, (10, side, side, 3), dtype=np.uint8)
    toy.write_mp4(root / "clip.mp4", frames, rate=2)
    prompter = Prompter(
        tokenizer, toy.CHAT_TEMPLATE, policy.geometry, min_pixels=1, max_pixels=10**9
    )
    return policy, prompter, Record("1", "What?", "<answer>A</answer>", root / "clip.mp4")


class Phases:
    """Seconds by phase; waits for the GPU at both ends."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def medians(self) -> dict[str, float]:
        medians = {name: statistics.median(values) for name, values in self.seconds.items()}
        return medians | {"step": sum(medians.values())}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(cfg: Config, policy: Policy, prompter: Prompter, record: Record, optimizer, phase) -> None:
    with phase("data"):
        question = prompter(record)
    with phase("rollout"), policy.gathered() as actor:
        group = sample_groups(cfg, actor, [question], [(0, 0, 0, 1)])[0]
    group.rewards_GK = rewards_of(cfg, group)
    group.advantages_G = torch.linspace(-1, 1, cfg.num_generations)
    with phase("score"):
        hidden = policy.hidden_states([group], [group.features])
        output = question_loss(cfg, policy, group, hidden[0])
    with phase("update"):
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def official(cfg: Config, policy: Policy, prompter: Prompter, record: Record, optimizer, phase):
    G, T, device, model = (
        cfg.num_generations,
        cfg.max_completion_length,
        policy.device,
        policy.model,
    )
    with phase("data"):
        question = prompter(record)
    ids = question.ids_P[None].to(device)
    is_video = (ids == model.config.video_token_id).int()
    patches, grid = question.patches.to(device), torch.tensor([question.grid], device=device)
    with phase("rollout"), torch.no_grad(), policy.compute():
        ids_GL = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=2 * is_video,
            pixel_values_videos=patches, video_grid_thw=grid, num_return_sequences=G,
            do_sample=True, max_new_tokens=T, min_new_tokens=T, top_k=0,
            suppress_tokens=policy.banned_V.nonzero()[:, 0].tolist(),  # random weights draw them
        )  # fmt: skip
    P = ids.shape[1]
    after = question.positions_3P.max() + 1 + torch.arange(T).expand(3, -1)
    positions = torch.cat([question.positions_3P, after], dim=1).to(device)
    lengths_G = torch.full((G,), T, device=device)
    with phase("score"):
        with policy.compute():
            logits = model(
                input_ids=ids_GL, position_ids=positions[:, None].expand(-1, G, -1),
                pixel_values_videos=patches.repeat(G, 1), video_grid_thw=grid.repeat(G, 1),
            ).logits  # fmt: skip
        logps_GLV = logits[:, :-1].log_softmax(-1)
        logps_GT = logps_GLV.gather(2, ids_GL[:, 1:, None])[..., 0][:, P - 1 :]
        divergence_T = reference.group_divergence(logps_GLV[:, P - 1 :].detach(), lengths_G)
        weights_T = reference.token_weights(divergence_T, cfg.alpha)
        advantages_G = torch.linspace(-1, 1, G, device=device)
        ratio_GT = torch.exp(logps_GT - logps_GT.detach())
        loss = -(ratio_GT * advantages_G[:, None] * weights_T).mean()
    with phase("update"):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--prompt", type=int, default=600, help="tokens of the prompt, about")
    parser.add_argument("--completion", type=int, default=64, help="tokens of each completion")
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attn_implementation", choices=ATTENTION, default="sdpa",
                        help="how our packed row is scored")  # fmt: skip
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw",
                        help="sgd keeps no moments, so that 7b leaves room")  # fmt: skip
    parser.add_argument("--only", choices=("ours", "official"), help="one of the two")
    parser.add_argument("--json", type=Path, help="also write the line to this file")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = Config(
        num_generations=args.num_generations, max_completion_length=args.completion,
        attn_implementation=args.attn_implementation,
    )  # fmt: skip
    try:
        check_attention(cfg, torch.device(device))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    policy, prompter, record = build(args.size, args.prompt, device)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(trained, lr=1e-9)
    ways = {"ours": ours, "official": official}
    ways = {args.only: ways[args.only]} if args.only else ways
    phases, peak = {name: Phases() for name in ways}, {}
    for repeat in range(args.repeats + 1):
        for name, way in ways.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            policy.attend_with(args.attn_implementation if name == "ours" else "sdpa")
            way(cfg, policy, prompter, record, optimizer, phases[name] if repeat else Phases())
            if device == "cuda":
                peak[name] = torch.cuda.max_memory_allocated() / 1e9
    result = dict(
        size=args.size,
        parameters=sum(p.numel() for p in policy.model.parameters()),
        prompt=len(prompter(record).ids_P),
        completion=args.completion,
        num_generations=args.num_generations,
        optimizer=args.optimizer,
        attn_implementation=args.attn_implementation,
        device=torch.cuda.get_device_name()
        if device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        **source(),
        **surroundings(),
        peak_memory_gb=peak,
        seconds={name: phase.medians() for name, phase in phases.items()},
    )
    for name, seconds in result["seconds"].items():
        print(f"{name:9}" + "".join(f"{k:>9} {v:8.3f} s" for k, v in seconds.items()))
    if len(ways) == 2:
        mine, theirs = (result["seconds"][name] for name in ("ours", "official"))
        keys = [key for key in mine if key != "data"]
        result["speedup"] = {key: theirs[key] / mine[key] for key in keys}
        print("speed-up " + "".join(f"{k:>9} {v:8.2f} x" for k, v in result["speedup"].items()))
    line = json.dumps(result)
    print(line)
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
