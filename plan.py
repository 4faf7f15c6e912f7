"""--dry_run: what a run would do, from its data and its config.json alone; no weights are touched.

It decodes the first questions and prints the prompt as the model gets it, the size of each clip,
what each GPU will hold, and the schedule.
"""

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

import ranks
import video
from data import Prompter, Record, check_prompts, load_chat_template, step_records
from loader import ClipReader
from policy import ModelError, Policy, read_config
from records import printable

GB = 1e9
QUESTIONS = 3


def show(cfg, records: list[Record]) -> None:
    """Prints the plan of a run with `cfg`, a config.Config. Raises VideoError on a bad clip."""
    name = cfg.model_name_or_path
    config = read_config(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of several libraries
        raise ModelError(f"{name}: its tokenizer cannot be loaded ({error})") from error
    with torch.device("meta"):
        policy = Policy(
            AutoModelForImageTextToText.from_config(config), tokenizer,
            load_chat_template(name, tokenizer),
        )  # fmt: skip
    questions = []
    with ClipReader(cfg.clip_timeout) as reader:
        prompter = Prompter(
            tokenizer, policy.chat_template, policy.geometry, cfg.question_type,
            cfg.fps, cfg.max_frames, cfg.min_pixels, cfg.max_pixels, load_clip=reader.load_clip,
            max_prompt_length=policy.longest_prompt(cfg.max_prompt_length),
        )  # fmt: skip
        check_prompts(prompter, records, cfg.jsonl_path)
        for record in step_records(records, 0, min(QUESTIONS, len(records)), cfg.seed):
            try:
                questions.append(prompter(record))
            except video.VideoError as error:
                print(printable(f"question {record.id}: would be skipped: {error}"))
    if not questions:
        raise video.VideoError(f"none of the first {QUESTIONS} clips can be read")
    print("The first prompt, to the letter:\n" + printable(questions[0].prompt) + "\n")
    for question in questions:
        (t, h, w), p = question.grid, policy.geometry.patch_size
        frames = t * policy.geometry.temporal_patch_size
        tokens = len(question.patches) // policy.geometry.merge_size**2
        shown = printable(question.record.id)
        print(
            f"question {shown}: {frames} frames x {h * p} x {w * p} pixels, "
            f"{question.seconds:.2f} s apart = {tokens} video tokens; "
            f"prompt {len(question.ids_P)} tokens"
        )

    print(f"\nMemory on each of {ranks.world()} GPU(s), GB (1e9 bytes), estimated:")
    parts = memory(cfg, policy, max(len(q.ids_P) for q in questions))
    for part, size in parts.items():
        print(f"  {part:44}{size / GB:8.2f}")
    always = sum(size for part, size in parts.items() if part.startswith("always"))
    for phase in ("rollout", "update"):
        size = always + sum(s for part, s in parts.items() if part.startswith(phase))
        print(f"  {'= during the ' + phase:44}{size / GB:8.2f}")

    per_rank = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps
    per_step = per_rank * ranks.world()
    print(
        f"\n{cfg.max_steps} steps x {per_step} questions x {cfg.num_generations} completions = "
        f"{cfg.max_steps * per_step / len(records):.2f} passes over {len(records)} questions; "
        f"a checkpoint every {cfg.save_steps} steps"
    )


def memory(cfg, policy: Policy, prompt: int) -> dict[str, float]:
    """What a GPU holds at completions of full length, bytes; the phase it is held in comes first.

    float32 parameters, gradients and two AdamW moments, spread over the ranks; a whole bf16 copy to
    decode with; activations as one bf16 vector per token and layer where they are checkpointed, and
    about 34 without (Korthikanti et al. 2022, arXiv 2205.05198, attention matrix not counted).
    """
    model, text = policy.model, policy.model.config.text_config
    everything = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in policy.vision.parameters()) if cfg.freeze_vision_modules else 0
    trained, world = everything - frozen, ranks.world()
    B, G, T = cfg.per_device_train_batch_size, cfg.num_generations, cfg.max_completion_length
    tokens = B * (prompt + G * T)
    head_dim = text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * 2  # bytes a token
    vectors = 1 if cfg.gradient_checkpointing else 17
    layer = 34 * text.hidden_size * tokens  # bytes: one layer at work
    kept = vectors * 2 * text.hidden_size * tokens * text.num_hidden_layers
    parts = {
        "always: parameters, float32": 4 * everything / world,
        "always: AdamW moments, float32": 8 * trained / world,
    }
    if cfg.beta > 0:
        parts["always: reference model, float32"] = 4 * everything / world
    questions = B * cfg.gradient_accumulation_steps
    return parts | {
        "rollout: gathered weights, bf16": 2 * everything,
        "rollout: keys and values, bf16": cached * questions * (prompt + G * T),
        "update: gradients, float32": 4 * trained / world,
        "update: kept activations, bf16": kept,
        "update: one layer at work": layer,
        "update: embedding and head gathered, bf16": 2 * 2 * text.vocab_size * text.hidden_size,
        "update: head, chunked, with dH": 1.3e9 + 4 * text.hidden_size * B * G * T,
    }
