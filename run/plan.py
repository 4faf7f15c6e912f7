"""--dry_run: shows what a run would do, from its data and the model's config.json, without weights.

It decodes the clips of the first questions and prints the exact prompt, the size of each clip, the
memory needed on each GPU, and the schedule.
"""

import video
from data import check_prompts, step_records
from files import UserError, printable
from model import ranks
from model.policy import Policy
from run.config import Config, show_toy_flags, training_records
from run.decoder import ClipReader
from run.setup import make_prompter

GB = 1e9
QUESTIONS = 3


def show(cfg: Config) -> None:
    """Prints the plan of a run. Raises UserError if no clip can be read."""
    if cfg.model_name_or_path is None:
        show_toy_flags(cfg)
        print("The run makes its clips and model; a dry run writes nothing, so it ends here.")
        return
    records = training_records(cfg)
    policy, questions = Policy.load(cfg.model_name_or_path, "meta"), []
    with ClipReader(cfg.clip_timeout) as reader:
        prompter = make_prompter(cfg, policy, load_clip=reader.load_clip)
        check_prompts(prompter, records, cfg.jsonl_path)
        for record in step_records(records, 0, min(QUESTIONS, len(records)), cfg.seed):
            try:
                questions.append(prompter(record))
            except video.VideoError as error:
                print(printable(f"question {record.id}: would be skipped: {error}"))
    if not questions:
        raise UserError(f"none of the first {QUESTIONS} clips can be read")
    print("The first prompt, verbatim:\n" + printable(questions[0].prompt) + "\n")
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
    phases = memory(cfg, policy, max(len(q.ids_P) for q in questions))
    always = sum(phases["always"].values())
    for phase, parts in phases.items():
        for part, size in parts.items():
            print(f"  {phase + ': ' + part:44}{size / GB:8.2f}")
        if phase != "always":
            size = always + sum(parts.values())
            print(f"  {'= during the ' + phase:44}{size / GB:8.2f}")

    per_rank = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps
    per_step = per_rank * ranks.world()
    print(
        f"\n{cfg.max_steps} steps x {per_step} questions x {cfg.num_generations} completions = "
        f"{cfg.max_steps * per_step / len(records):.2f} passes over {len(records)} questions; "
        f"a checkpoint every {cfg.save_steps} steps"
    )


def memory(cfg: Config, policy: Policy, prompt: int) -> dict[str, dict[str, float]]:
    """The memory on a GPU in each phase with completions of full length, by part, in bytes; the
    parts in "always" come on top.

    Each phase lists what is alive at its peak. tests/test_fake_gpu.py compares this with every
    tensor of a run on one GPU; what FSDP gathers is calculated, not measured. Activations are
    counted in bytes per token of a decoder layer with D hidden and F intermediate features. Not
    counted: the activations of a trained vision tower, and without checkpointing the G copies of
    the prompt's keys and values, about 6 % of a prompt token's activations in 7B.
    """
    model, text = policy.model, policy.model.config.text_config
    D, F, V = text.hidden_size, text.intermediate_size, text.vocab_size
    everything = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in policy.vision.parameters()) if cfg.freeze_vision_modules else 0
    layers = sum(p.numel() for p in policy.text.layers.parameters())
    trained, world, layer = everything - frozen, ranks.world(), layers / text.num_hidden_layers
    B, G, T = cfg.per_device_train_batch_size, cfg.num_generations, cfg.max_completion_length
    tokens = B * (prompt + G * T)
    head_dim = getattr(text, "head_dim", D // text.num_attention_heads)
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * 2  # bytes per token

    if cfg.gradient_checkpointing:  # the input of each layer, in the dtype of the embeddings
        kept = text.num_hidden_layers * tokens * D * (2 if world > 1 else 4)
        forward = tokens * (6 * F + 4 * D)
    else:
        kept = text.num_hidden_layers * tokens * (8 * F + 34 * D)
        forward = 0
    if world > 1:  # gathered: embedding and head for the whole phase, and two layers at a time
        tables = 2 * V * D * (1 if model.config.tie_word_embeddings else 2)
        in_bf16, in_backward = tables + 4 * layer, 2 * tables + 4 * layer
    else:  # autocast's copies, which last for the forward pass, or longer without checkpointing
        in_bf16 = 2 * (layers + B * V * D)  # the head is cast for each question
        in_backward = 2 * layer
    gradients = 4 * trained / world
    earlier = gradients if cfg.gradient_accumulation_steps > 1 else 0  # of other micro-batches
    freed = 2 * layers if world == 1 and cfg.gradient_checkpointing else 0  # before the head runs
    # A chunk of logits in float32, the rows kept in bf16, and hidden states.
    head = 4 * V * min(2048, G * T) + min(1.25e9, 2 * V * B * G * T) + 4 * D * B * G * T
    # The backward frees activations as it creates gradients, so it peaks at its start or its end.
    first = {
        "kept activations": kept,
        "weights in bf16": in_bf16 if not cfg.gradient_checkpointing else in_backward,
        "head at work, its gradient": max(head + 2 * V * D, 4 * V * D * min(B, 2)),
        "gradients of earlier micro-batches": earlier,
    }
    layer_at_work = tokens * (16 * F + 28 * D)
    last = {
        "gradients, float32": gradients,
        "weights in bf16": in_backward,
        "one layer at work, no embedding yet": max(0, layer_at_work - 4 * V * D / world),
    }
    return dict(
        always={
            "parameters, float32": 4 * everything / world,
            "AdamW moments, float32": 8 * trained / world,
            "reference model, float32": 4 * everything / world if cfg.beta > 0 else 0,
        },
        rollout={
            "gathered weights, bf16": 2 * everything,
            "keys and values, bf16": cached * tokens * cfg.gradient_accumulation_steps,
        },
        score={
            "kept activations": kept,
            "weights in bf16": in_bf16,
            "one layer or the head at work": max(forward, head - freed),
            "gradients of earlier micro-batches": earlier,
        },
        update=max(first, last, key=lambda moment: sum(moment.values())),
    )
