"""The built-in toys: moving coloured shapes, and a tiny Qwen2.5-VL that half understands them.

`python twgrpo.py` without a model starts here. The toys use the usual formats (H.264 files, records
in JSONL, a Hugging Face checkpoint directory), so everything after them is the same code path as
training Qwen2.5-VL-7B-Instruct on CLEVRER.

A toy describes its clips, questions and imperfect answers: `colours`, the default, here; `events`,
with longer answers, in events.py. `prepare` makes either from its description. A short supervised
warm start takes the place of pretraining. It teaches the model to see and to use the right format,
but its targets are often wrong, so that about a third of the sampled answers are right and rewards
differ within a group. A toy shows that the loop works, not that TW-GRPO beats GRPO.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

import events
from data import TEMPLATES, Prompter, Question
from kernels import reference
from model.packing import Group
from model.policy import Policy
from records import Record, load_records
from video import ClipSettings

# All settings that differ from the recipe for a 7B model (the defaults of Config).
BOTH = dict(
    gradient_checkpointing=False,
    dataloader_num_workers=0,
    adam_beta2=0.99,
    max_grad_norm=1.0,
    warmup_steps=10,
)
CLIP = dict(max_frames=4, min_pixels=56 * 56, max_pixels=56 * 56)
DEFAULTS = dict(
    **BOTH,
    **CLIP,
    per_device_train_batch_size=16,
    max_completion_length=20,
    learning_rate=5e-4,
    max_steps=400,
    save_steps=100,
)

COLOURS = events.COLOURS | dict(white=(240, 240, 240))
SIDE, FRAMES, RATE = 56, 8, 4  # pixels, frames, frames per second: a clip of 2 s

SPECIAL_TOKENS = [
    f"<|{name}|>"
    for name in (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
        "quad_end vision_start vision_end vision_pad image_pad video_pad"
    ).split()
]
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 512  # maximum; a toy's text needs fewer, one token per word
TEXT_SIZES = dict(
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=256,
)
VISION_SIZES = dict(depth=1, hidden_size=64, num_heads=4)


# -------------------------------------------------------------------------------------------- clips


def draw_clip(colours: list[str], rng: np.random.Generator) -> np.ndarray:
    """Draws discs and squares, each drifting in its own quarter: (F, H, W, 3) uint8."""
    frames = np.full((FRAMES, SIDE, SIDE, 3), rng.integers(20, 70), dtype=np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE]
    quarters = rng.permutation(4)
    for quarter, colour in zip(quarters, colours, strict=False):
        centre = np.array(divmod(quarter, 2)) * SIDE / 2 + SIDE / 4 + rng.uniform(-3, 3, 2)
        speed, radius, is_disc = rng.uniform(-1, 1, 2), rng.uniform(8, 11), rng.random() < 0.5
        for k in range(FRAMES):
            dy, dx = np.abs(y - centre[0] - k * speed[0]), np.abs(x - centre[1] - k * speed[1])
            inside = np.hypot(dy, dx) < radius if is_disc else np.maximum(dy, dx) < radius * 0.85
            frames[k][inside] = COLOURS[colour]
    return frames


def write_mp4(path: Path, frames_FHW3: np.ndarray, rate: int | Fraction) -> None:
    """Writes H.264 in an mp4, as any camera or dataset would; `rate` is in frames per second."""
    import av

    with av.open(str(path), "w") as container:
        options = {"crf": "18", "preset": "ultrafast"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames_FHW3.shape[1:3]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for picture in frames_FHW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def scene(rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """A clip with one to four colours, and a question row with at least one right answer."""
    names = list(COLOURS)
    shown = rng.choice(names, rng.integers(1, 5), replace=False).tolist()
    options = []
    while not set(options) & set(shown):
        options = rng.choice(names, 4, replace=False).tolist()
    lettered = dict(zip("ABCD", options, strict=True))
    right = [letter for letter, option in lettered.items() if option in shown]
    lines = [f"{letter}. {option}" for letter, option in lettered.items()]
    row = dict(
        problem="\n".join(["Which colours appear?", *lines]),
        solution=f"<answer>{','.join(right)}</answer>",
    )
    return draw_clip(shown, rng), row


def imperfect_target(row: dict, rng: np.random.Generator) -> str:
    """An answer in perfect format that names each true option with p = 0.6 and each false one with
    p = 0.25, but at least one."""
    options = dict(line.split(". ") for line in row["problem"].split("\n")[1:])
    while True:
        named = [o for o in options if rng.random() < (0.6 if o in row["solution"] else 0.25)]
        if named:
            seen = " ".join(options[o] for o in named)
            return f"<think>I see {seen}</think><answer>{','.join(named)}</answer>"


@dataclass(frozen=True)
class Toy:
    """What differs between the toys."""

    scene: Callable  # draws the frames of a clip and the row of a question about it
    target: Callable  # draws an imperfect answer to a row
    rate: int | Fraction  # frames per second of the files
    defaults: dict  # the settings that differ from the recipe for a 7B model
    steps: int  # of the warm start
    targets: int  # per question in a warm-start step


TOYS = dict(
    colours=Toy(scene, imperfect_target, RATE, DEFAULTS, steps=900, targets=4),
    events=Toy(
        events.scene,
        events.imperfect_target,
        events.RATE,
        BOTH | events.DEFAULTS,
        steps=500,
        targets=2,
    ),
)


def write_clips(
    root: Path, seed: int, toy: Toy = TOYS["colours"], train: int = 1024, test: int = 128
) -> tuple[Path, Path]:
    """Writes root/clips/*.mp4 and their records. Returns (train.jsonl, test.jsonl)."""
    (root / "clips").mkdir(parents=True)
    rng = np.random.default_rng([seed, 0])
    for split, count in (("train", train), ("test", test)):
        rows = []
        for k in tqdm(range(count), desc=f"writing {split} clips", leave=False):
            frames, row = toy.scene(rng)
            row = dict(id=f"{split}-{k}", **row, video=f"clips/{split}_{k:03d}.mp4")
            write_mp4(root / row["video"], frames, toy.rate)
            rows.append(json.dumps(row) + "\n")
        (root / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    return root / "train.jsonl", root / "test.jsonl"


# -------------------------------------------------------------------------------------------- model


def build_tokenizer(corpus: list[str]) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen's structure and special tokens, and merges learned on `corpus`."""
    qwen, learner = Qwen2Tokenizer()._tokenizer, Tokenizer(models.BPE())
    for part in ("pre_tokenizer", "normalizer", "decoder"):
        setattr(learner, part, getattr(qwen, part))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    learned = json.loads(learner.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def toy_tokenizer(records: list[Record], seed: int, toy: Toy = TOYS["colours"]) -> Qwen2Tokenizer:
    """A tokenizer for the toy's own text, in which every word is one token."""
    rng, template = np.random.default_rng([seed, 2]), TEMPLATES["mixed"]
    texts = [
        f"{template.replace('{problem}', r.problem)}\n{toy.target(r.row, rng)}" for r in records
    ]
    return build_tokenizer([*texts, "system\nYou are a helpful assistant.\nuser\nassistant\n"])


def build_model(
    tokenizer: Qwen2Tokenizer, seed: int = 0, vision: dict | None = None, **text: int
) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised Qwen2.5-VL in float32, with the ids of `tokenizer`. `text` and
    `vision` override sizes, named as in transformers' configs.

    The wide initialisation (0.05 for text, 0.1 for vision) matters at this size: with the usual
    0.02, the model did not learn to see during the warm start.
    """
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    text = TEXT_SIZES | dict(vocab_size=len(tokenizer)) | text
    vision = VISION_SIZES | (vision or {})
    # Rotary pairs per head, split over time, height and width.
    pairs = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8]
    config = Qwen2_5_VLConfig(
        text_config=dict(
            **text,
            initializer_range=0.05,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=sections),
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
        ),
        vision_config=dict(
            **vision,
            intermediate_size=2 * vision["hidden_size"],
            out_hidden_size=text["hidden_size"],
            initializer_range=0.1,
            tokens_per_second=2,
            fullatt_block_indexes=[vision["depth"] - 1],
            window_size=112,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    return model


def warm_start(
    policy: Policy, questions: list[Question], seed: int, steps: int, toy: Toy = TOYS["colours"]
) -> None:
    """Supervised training on 16 prompts with imperfect targets per step. The progress bar shows the
    last loss, in nats."""
    rng, R = np.random.default_rng([seed, 1]), toy.targets
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / 20) * (0.1 + 0.9 * (1 - k / steps))
    )
    bar = tqdm(range(steps), desc="warm start")
    for _ in bar:
        chosen = [questions[k] for k in rng.choice(len(questions), 16, replace=False)]
        texts = [toy.target(q.record.row, rng) + "<|im_end|>" for q in chosen for _ in range(R)]
        targets = [torch.tensor(ids) for ids in policy.tokenizer(texts)["input_ids"]]
        groups = [Group(q, targets[R * k : R * k + R]) for k, q in enumerate(chosen)]
        hidden = policy.hidden_states(groups)
        targets_N = torch.cat([g.targets_N for g in groups])
        loss = -reference.token_logps(torch.cat(hidden), policy.head_VD, targets_N).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")


def prepare(
    root: Path, seed: int, toy: str = "colours", steps: int | None = None, **counts: int
) -> None:
    """Creates all that a run needs under `root`, unless it is there: clips, train.jsonl,
    test.jsonl, and a model warm-started for `steps` steps (default: the toy's). `counts`: how many
    clips for `train` and `test`, as in `write_clips`.

    Writes next to `root` and renames when complete, so a kill leaves nothing half-made. Raises
    FileExistsError if something else is there.
    """
    if is_world(root, toy, seed):
        return
    if root.exists():
        raise FileExistsError(f"{root} is not the world of --toy {toy} --seed {seed}; remove it")
    print("Making the toy's clips and model takes two to three minutes.", flush=True)
    unfinished = root.with_name(f".{root.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # left over from a killed start
    kind = TOYS[toy]
    records = load_records(write_clips(unfinished, seed, kind, **counts)[0], unfinished)
    tokenizer = toy_tokenizer(records, seed, kind)
    policy = Policy(build_model(tokenizer, seed=seed), tokenizer, CHAT_TEMPLATE)
    clips = ClipSettings(**{name: kind.defaults[name] for name in CLIP})
    prompter = Prompter(tokenizer, CHAT_TEMPLATE, policy.geometry, clips=clips)
    steps = kind.steps if steps is None else steps
    warm_start(policy, [prompter(r) for r in records], seed, steps, kind)
    policy.save(unfinished / "model")
    (unfinished / "toy.json").write_text(json.dumps(dict(toy=toy, seed=seed)), encoding="utf-8")
    os.replace(unfinished, root)


def is_world(root: Path, toy: str | None, seed: int) -> bool:
    """Whether `root` holds the complete world for this toy and seed."""
    try:
        return json.loads((root / "toy.json").read_bytes()) == dict(toy=toy, seed=seed)
    except (OSError, ValueError):
        return False
