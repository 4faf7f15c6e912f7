"""One training step of Qwen2.5-VL with random weights, phase by phase, against the official way.

    python -m benchmarks.step --size tiny
    python -m benchmarks.step --size 7b --prompt 1100 --completion 170 --json step.json

ours      the video encoded once, the prompt prefilled once, one packed row, the head of `kernels`
official  restated from aa529ff grpo_trainer.py: generate(num_return_sequences=G), which encodes the
          video and prefills the prompt G times, then G padded copies with the logits of every
          position materialised, and the group divergence over their log-softmax

Both sample completions of the same length and take one optimizer step from it; both keep the vision
tower frozen. Seconds are medians over `--repeats`. The model has float32 parameters and computes in
bf16 on a GPU, in float32 on a CPU. The frames are random: no codec is needed.

Ours comes first, under each attention at each length. Each way is written to the file as it ends,
one that needs more memory than there is as well, and the same command goes on where it was
interrupted. Decoding a token reads every weight of the language model once, and keys and values:
`roofline` is the time that takes at the speed of a large copy on this device, as a share of the
time that a token took.
"""

import argparse
import contextlib
import functools
import math
import statistics
import time
from pathlib import Path
from unittest import mock

import torch

import toy
import twgrpo
import video
from benchmarks.origin import Results
from data import TEMPLATES, Prompter, Question
from files import UserError
from kernels import reference
from model import rollout
from model.packing import ATTENTION
from model.policy import Policy
from records import Record
from run.config import Config, check_attention

SIZES = {
    "tiny": dict(hidden_size=512, layers=10, heads=8, kv_heads=2, intermediate_size=1408,
                 vision_depth=2, vision_hidden_size=256),
    "3b": dict(hidden_size=2048, layers=36, heads=16, kv_heads=2, intermediate_size=11008,
               vision_depth=32, vision_hidden_size=1280, vision_heads=16, vocab_size=151936),
    "7b": dict(hidden_size=3584, layers=28, heads=28, kv_heads=4, intermediate_size=18944,
               vision_depth=32, vision_hidden_size=1280, vision_heads=16, vocab_size=152064),
}  # fmt: skip


PHASES = ("data", "rollout", "score", "update")
COLUMNS = dict(way="", attention="", prompt="", completion="") | {
    name: ".2f" for name in (*(f"{phase}_s" for phase in PHASES), "step_s", "decode_ms", "read_gb")
} | dict(roofline=".0%", peak_gb=".1f")  # fmt: skip


def build(size: str, prompt: int, device: str):
    """A model of that size, and a function that makes a question of about `prompt` tokens."""
    tokenizer = toy.build_tokenizer(list(TEMPLATES.values()))
    with torch.device(device):
        model = toy.build_model(tokenizer, **SIZES[size]).eval()
    policy = Policy(model, tokenizer, toy.CHAT_TEMPLATE)
    policy.vision.requires_grad_(False)
    policy.eos_ids = torch.tensor([-1])  # every completion runs to its full length
    side = 28 * max(2, round(((prompt - 90) / 5) ** 0.5))  # 10 frames: 5 temporal patches
    frames = torch.randint(255, (10, 3, side, side), dtype=torch.uint8)
    prompter = Prompter(tokenizer, toy.CHAT_TEMPLATE, policy.geometry)
    record = Record("1", "What?", "<answer>A</answer>", Path("random frames"))
    return policy, lambda: prompter.question(record, video.Clip(frames, seconds=0.5))


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
        return {name: statistics.median(values) for name, values in self.seconds.items()}

    @contextlib.contextmanager
    def decoding(self):
        """Times what the decoder does after its prefill, as the phase "decode"."""
        run = rollout.Decoder.run

        def timed(decoder, *args, **options):
            with self("decode"):
                run(decoder, *args, **options)

        with mock.patch.object(rollout.Decoder, "run", timed):
            yield


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bandwidth(device: str) -> float:
    """Bytes a second of a large copy on this device, those read and those written."""
    source = torch.ones(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    copy, phase = torch.empty_like(source), Phases()
    for _ in range(7):
        with phase("copy"):
            copy.copy_(source)
    return 2 * source.numel() / min(phase.seconds["copy"])


def bytes_of_a_token(policy: Policy, prompt: int, cfg: Config) -> float:
    """What decoding one token of G completions has to read, on average: the weights of the language
    model once, the prompt's keys and values once, half of the completions' own."""
    G, T, text = cfg.num_generations, cfg.max_completion_length, policy.text.config
    embedding = policy.text.embed_tokens.weight.numel()
    weights = sum(p.numel() for p in policy.text.parameters()) - embedding + policy.head_VD.numel()
    head_dim = text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * (prompt + G * T / 2)
    return (weights + cached) * policy.compute_dtype.itemsize


def ours(cfg: Config, policy: Policy, ask, optimizer, phase) -> None:
    with phase("data"):
        question: Question = ask()
    with phase("rollout"), phase.decoding():
        (group,) = twgrpo.sample_groups(cfg, policy, [question], [(0, 0, 0, 1)])
    group.rewards_GK = twgrpo.rewards_of(cfg, group)
    group.advantages_G = torch.linspace(-1, 1, cfg.num_generations)
    with phase("score"):
        loss, _ = twgrpo.score_groups(cfg, policy, [group])
    with phase("update"):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def official(cfg: Config, policy: Policy, ask, optimizer, phase) -> None:
    G, T = cfg.num_generations, cfg.max_completion_length
    device, model = policy.device, policy.model
    with phase("data"):
        question: Question = ask()
    ids = question.ids_P[None].to(device)
    is_video = (ids == model.config.video_token_id).int()
    patches, grid = question.patches.to(device), torch.tensor([question.grid], device=device)
    policy.text.eval()
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
        policy.text.train(policy.gradient_checkpointing)
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


WAYS = {"ours": ours, "official": official}


def measure(way: str, cfg: Config, policy: Policy, ask, optimizer, repeats: int) -> dict:
    """What the row of one way holds: seconds by phase, and the largest memory, GB (1e9 bytes)."""
    on_cuda, phases = policy.device.type == "cuda", Phases()
    policy.attend_with(cfg.attn_implementation)
    try:
        for repeat in range(repeats + 1):  # the first compiles, loads and allocates
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
            WAYS[way](cfg, policy, ask, optimizer, phases if repeat else Phases())
    finally:
        optimizer.zero_grad(set_to_none=True)  # also where it ran out of memory
    seconds = phases.medians()
    row = {f"{name}_s": seconds[name] for name in PHASES}
    row["step_s"] = sum(row.values())
    if "decode" in seconds and cfg.max_completion_length > 1:
        a_token = seconds["decode"] / (cfg.max_completion_length - 1)
        read = bytes_of_a_token(policy, len(ask().ids_P), cfg)
        share = read / bandwidth(policy.device.type) / a_token
        row |= dict(decode_ms=1e3 * a_token, read_gb=read / 1e9, roofline=share)
    return row | (dict(peak_gb=torch.cuda.max_memory_allocated() / 1e9) if on_cuda else {})


def run(args: argparse.Namespace, results: Results) -> None:
    """The rows of every way under every attention at every length, ours first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy, ask = build(args.size, args.prompt, device)
    if args.gradient_checkpointing:
        policy.checkpoint_activations()
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(trained, lr=1e-9)
    settings = dict(
        size=args.size, prompt=len(ask().ids_P), num_generations=args.num_generations,
        optimizer=args.optimizer, gradient_checkpointing=args.gradient_checkpointing,
    )  # fmt: skip
    cases = []
    for attention in args.attn_implementation:
        try:
            check_attention(Config(attn_implementation=attention), policy.device)
            cases += [("ours", attention, T) for T in args.completion]
        except UserError as error:
            print(f"left out: {error}")
    cases += [("official", "sdpa", T) for T in args.completion]
    for way, attention, T in cases:
        if way == (args.only or way):
            lengths = dict(num_generations=args.num_generations, max_completion_length=T)
            cfg = Config(**lengths, attn_implementation=attention)
            work = functools.partial(measure, way, cfg, policy, ask, optimizer, args.repeats)
            results.measure(work, way=way, attention=attention, completion=T, **settings)
    for T in args.completion:
        mine, theirs = (results.find(way=w, completion=T, **settings) for w in WAYS)
        if mine and theirs and not {"failed"} & (mine.keys() | theirs.keys()):
            names = [f"{phase}_s" for phase in (*PHASES[1:], "step")]
            faster = {name: theirs[name] / mine[name] for name in names}
            results.measure(lambda f=faster: f, way="times faster", completion=T, **settings)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    top.add_argument("--size", choices=SIZES, default="tiny")
    top.add_argument("--prompt", type=int, default=600, help="tokens of the prompt, about")
    top.add_argument("--completion", type=int, nargs="+", default=[64], help="tokens of each")
    top.add_argument("--num_generations", type=int, default=8)
    top.add_argument("--repeats", type=int, default=3)
    top.add_argument("--attn_implementation", choices=ATTENTION, nargs="+", default=["sdpa"],
                     help="how our packed row is scored")  # fmt: skip
    top.add_argument("--gradient_checkpointing", action="store_true", help="in both ways")
    top.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw",
                     help="sgd keeps no moments, so that 7b leaves room")  # fmt: skip
    top.add_argument("--only", choices=WAYS, help="one of the two")
    top.add_argument("--minutes", type=float, default=math.inf, help="then begin nothing new")
    top.add_argument("--json", type=Path, help="write the results to this file, way by way")
    return top


def main() -> None:
    args = parser().parse_args()
    results = Results(args.json, COLUMNS, args.minutes)
    run(args, results)
    print(results.json())


if __name__ == "__main__":
    main()
