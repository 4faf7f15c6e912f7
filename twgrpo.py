"""Train a video-language model with TW-GRPO: token-weighted group relative policy optimization.

    python twgrpo.py                  the embedded default: tiny model, synthetic clips, no GPU
    python twgrpo.py --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct --jsonl_path train.json ...

One step of `train`, below (the paper: arXiv 2505.24718; the equations: docs/equations.md):
    1. take the step's questions, and encode each video once    policy.Policy.encode_videos
    2. sample G completions of each question (eqs. 5, 6)        policy.Policy.rollout
    3. reward each: soft accuracy + format (eqs. 1, 3)          rewards.py
    4. compare within the group: A = (r - mean) / std (eq. 4)   group_advantages
    5. score them, one packed row per question (eqs. 7, 8)      policy.Policy.hidden_states
    6. weigh each position by how much the group disagrees
       there, take the clipped, weighted loss (eqs. 9 to 26)    kernels.tw_grpo_head
    7. step the optimizer

Letters in shapes: B questions of a step, G completions of each, K reward functions, N completion
tokens of a question, D hidden size.
"""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import files
from data import Prompter, Question, check_prompts
from eval import evaluate
from files import UserError
from kernels import HeadOutput, token_logps, tw_grpo_head
from model import ranks
from model.packing import Group
from model.policy import Policy
from records import Record, printable
from rewards import REWARDS
from run import checkpoint, plan
from run.clips import QuestionsAhead
from run.config import (
    Config,
    check_attention,
    held_out_records,
    make_output_dir,
    make_toy,
    parse_config,
    show_toy_flags,
    toy_config,
    training_records,
)
from run.decoder import ClipReader
from run.log import RunLog
from tools import curves
from video import VideoError

# ------------------------------------------------------------------------------------ the algorithm


def group_advantages(rewards_G: Tensor) -> Tensor:
    """Eq. 4: A_i = (r_i - mean r) / (std r + 1e-4) over the group: (G,); std has ddof = 1.

    A group whose rewards are all equal has advantage 0 and teaches nothing.
    """
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + 1e-4)


def train(
    cfg: Config,
    policy: Policy,
    records: list[Record],
    prompter: Prompter,
    log: RunLog,
    resume: tuple[Path, dict] | None = None,
) -> int:
    """The loop, the same on every rank. Returns the steps done: max_steps, or fewer on a signal.

    `resume` is a checkpoint and its counters.
    """
    reference = load_policy(cfg, freeze_all=True) if cfg.beta > 0 else None
    optimizer = make_optimizer(cfg, policy)
    if resume:
        checkpoint.load(resume[0], policy, optimizer)
        log.go_on_from(resume[1])
    saver = checkpoint.Saver(cfg, policy, optimizer, log, resume)
    step, failures, ending = saver.step, 0, None
    ahead = QuestionsAhead(cfg, records, prompter, log, step + 1)

    with ranks.StopSignal() as stop, contextlib.closing(ahead), saver.rescuing():
        bar = tqdm(
            range(step + 1, cfg.max_steps + 1), "training", cfg.max_steps, initial=step,
            disable=not ranks.is_main(),
        )  # fmt: skip
        for step in bar:
            with ranks.alone(), log.phase("data"):
                questions, seeds = ahead.take(step)
            with log.phase("rollout"), policy.gathered() as actor, ranks.alone():
                groups = sample_groups(cfg, actor, questions, seeds)
                for group in groups:
                    group.rewards_GK = rewards_of(cfg, group)
                    group.advantages_G = group_advantages(group.rewards_GK.sum(-1))

            count = ranks.total(len(groups))  # questions of this step, on all ranks
            if reference and count:
                score_reference(cfg, reference, groups, log)
            for _ in range(cfg.num_iterations if count else 0):
                loss = backward(cfg, policy, groups, count, step, log)
                updated = update(cfg, policy, optimizer, step, loss, log)
                failures = 0 if updated else failures + 1
                if not updated:
                    log.not_finite(step, groups, loss)

            log.add(learning_rate=rate(cfg, step))
            log.end_step(step, bar)
            saver.finished(step)
            ending = log.reason_to_end(step, failures)
            leaving = ending or ranks.agree(stop.requested) or step == cfg.max_steps
            if leaving or step % cfg.save_steps == 0:
                saver.save()
            if leaving:
                break
    if ending:
        raise UserError(f"{ending}; {saver.saved} holds the run so far")
    return step


def sample_groups(
    cfg: Config, actor: Policy, questions: list[Question], seeds: list[tuple[int, ...]]
) -> list[Group]:
    """G completions of each question; each video is encoded once, and kept if it stays the same."""
    if not questions:
        return []
    with torch.no_grad():
        features = actor.encode_videos(questions)
    groups = actor.rollout(
        questions, features, cfg.num_generations, cfg.max_completion_length, cfg.temperature, seeds
    )
    if cfg.freeze_vision_modules:
        for group, tokens in zip(groups, features, strict=True):
            group.features = tokens
    return groups


def rewards_of(cfg: Config, group: Group) -> Tensor:
    """The rewards of each completion: (G, K), K in the order of cfg.reward_funcs."""
    solution = group.question.record.solution
    return torch.tensor(
        [[REWARDS[name](text, solution) for name in cfg.reward_funcs] for text in group.texts]
    )


def micro_batches(cfg: Config, groups: list[Group]) -> list[list[Group]]:
    """At most B groups each. On several ranks always the same number of them, some perhaps empty,
    because every one is a round of collectives."""
    B = cfg.per_device_train_batch_size
    chunks = [groups[k : k + B] for k in range(0, B * cfg.gradient_accumulation_steps, B)]
    return chunks if ranks.world() > 1 else [chunk for chunk in chunks if chunk]


def backward(
    cfg: Config, policy: Policy, groups: list[Group], count: float, step: int, log: RunLog
) -> float:
    """Eq. 20: gradient of the mean loss over the step's `count` questions, on all ranks; the loss.

    Each question counts 1 / count, however the questions are spread over ranks and micro-batches.
    """
    total = 0.0
    for chunk in micro_batches(cfg, groups):
        with log.phase("score"):
            loss, outputs = policy.run(score, cfg, policy, chunk)
        with log.phase("update"):
            # FSDP averages gradients over the ranks; we want their sum over the questions.
            (loss * (ranks.world() / count)).backward()
        total += loss.item()
        if chunk and chunk[0].old_logps_N is None:
            log.scored(step, chunk, outputs)
            if chunk[0] is groups[0]:
                log.sample(step, chunk[0], outputs[0], policy.tokenizer)
            for group, output in zip(chunk, outputs, strict=True):
                group.old_logps_N = output.logps_N  # from now on, the ratio is to these
        for output in outputs:
            log.add(kl=output.kl, clip_ratio=output.clip_ratio)
    return ranks.total(total) / count


def score(cfg: Config, policy: Policy, groups: list[Group]) -> tuple[Tensor, list[HeadOutput]]:
    """The summed loss of some questions, and what was measured.

    Without a question the loss is 0 and so is its gradient, but every parameter has taken part in
    it: the other ranks wait for each of them.
    """
    scored = groups or [idle_group(policy)]
    hidden = policy.hidden_states(scored, video_tokens(policy, scored))
    outputs = [question_loss(cfg, policy, *pair) for pair in zip(scored, hidden, strict=True)]
    return torch.stack([o.loss for o in outputs]).sum(), outputs if groups else []


def idle_group(policy: Policy) -> Group:
    """A group without advantage, and so without gradient."""
    group = policy.idle_group()
    group.advantages_G = torch.zeros(1)
    return group


def video_tokens(policy: Policy, groups: list[Group]) -> list[Tensor]:
    """The rollout's, if it kept them because the vision tower is frozen; else with gradient."""
    if groups[0].features is None:
        return policy.encode_videos([group.question for group in groups])
    return [group.features for group in groups]


def question_loss(cfg: Config, policy: Policy, group: Group, hidden_ND: Tensor) -> HeadOutput:
    """The loss of one question from the hidden states that predict its completion tokens."""
    device, dtype = hidden_ND.device, policy.compute_dtype
    return tw_grpo_head(
        hidden_ND.to(dtype),
        policy.head_VD.to(dtype),
        group.targets_N.to(device),
        group.lengths_G.to(device),
        group.advantages_G.to(device),
        old_logps_N=group.old_logps_N,
        ref_logps_N=group.ref_logps_N,
        alpha=cfg.alpha,
        eps_low=cfg.epsilon,
        eps_high=cfg.epsilon_high,
        beta=cfg.beta if group.ref_logps_N is not None else 0.0,
        temperature=cfg.temperature,
        loss_type=cfg.loss_type,
        divergence=cfg.divergence,
        ended_rows=cfg.ended_rows,
    )


@torch.no_grad()
def score_reference(cfg: Config, reference: Policy, groups: list[Group], log: RunLog) -> None:
    """Puts the log-probs under the reference model into each group."""

    def score_chunk(chunk: list[Group]) -> None:
        hidden = reference.hidden_states(chunk, video_tokens(reference, chunk))
        for group, hidden_ND in zip(chunk, hidden, strict=True):
            dtype, targets = reference.compute_dtype, group.targets_N.to(hidden_ND.device)
            group.ref_logps_N = token_logps(
                hidden_ND.to(dtype), reference.head_VD.to(dtype), targets, cfg.temperature
            )

    with log.phase("score"):
        for chunk in micro_batches(cfg, groups):
            reference.run(score_chunk, chunk or [reference.idle_group()])


def update(
    cfg: Config, policy: Policy, optimizer: torch.optim.Optimizer, step: int, loss: float, log
) -> bool:
    """One optimizer step from the gradients that have gathered; False: they were not finite, and
    the weights are left as they are. The same on every rank."""
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), cfg.max_grad_norm)
    norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate(cfg, step)
        optimizer.step()
        log.add(loss=loss, grad_norm=norm)
    else:
        log.nonfinite += 1
    optimizer.zero_grad(set_to_none=True)
    return finite


def rate(cfg: Config, step: int) -> float:
    """The learning rate of a step (from 1): linear warm-up, then linear to 0 after max_steps."""
    warm = min(1.0, step / (cfg.warmup_steps + 1))
    return cfg.learning_rate * warm * (1 - (step - 1) / cfg.max_steps)


def make_optimizer(cfg: Config, policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in policy.model.parameters() if p.requires_grad],
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        weight_decay=cfg.weight_decay,
        fused=policy.device.type == "cuda",  # elsewhere AdamW makes copies as large as its states
    )


# --------------------------------------------------------------------------------------------- main


def load_policy(cfg: Config, freeze_all: bool = False) -> Policy:
    """The model of --model_name_or_path on this rank's device, or its share of it."""
    device, several = ranks.start(), ranks.world() > 1
    place = "cpu" if several else device
    policy = Policy.load(
        cfg.model_name_or_path, place, cfg.freeze_vision_modules, cfg.attn_implementation
    )
    if freeze_all:
        policy.model.requires_grad_(False)
    elif cfg.gradient_checkpointing:
        policy.checkpoint_activations()
    if several:
        policy.shard(device)
    return policy


def measure(cfg: Config, policy: Policy, prompter: Prompter, records: list[Record]) -> dict:
    """Sampled and greedy accuracy, and sampled with the wrong video as a control."""
    common = dict(max_completion_length=cfg.max_completion_length, seed=cfg.seed)
    sampled = dict(temperature=cfg.temperature, num_generations=cfg.num_generations, **common)
    with policy.gathered() as actor, ClipReader(cfg.clip_timeout) as reader:
        prompter = dataclasses.replace(prompter, load_clip=reader.load_clip)
        measures = {
            "sampled": evaluate(actor, prompter, records, **sampled),
            "greedy": evaluate(actor, prompter, records, temperature=0.0, **common),
        }
        if len(records) > 1:
            measures["wrong video"] = evaluate(
                actor, prompter, records, wrong_video=True, **sampled
            )
        return measures


def read_measures(path: Path) -> dict:
    """eval.json as far as there is one. Raises UserError if it is damaged."""
    remedy = "remove it, and what it held is measured once more"
    measures = files.read_json(path, remedy) if path.exists() else {}
    try:
        for name in measures.keys() & {"before", "after"}:
            for row in measures[name].values():
                [float(row[key]) for key in ("soft", "exact", "format")]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not the eval.json of a run; {remedy}") from None
    return measures


def write_measures(path: Path, measures: dict) -> None:
    with files.replacing(path) as beside:
        beside.write_text(json.dumps(measures, indent=2) + "\n", encoding="utf-8")


def print_measures(before: dict, after: dict, count: int) -> None:
    print(f"\n{count} held-out questions    soft accuracy     exact accuracy    format")
    print(f"{'':20}" + "    before   after" * 3)
    for name in before:
        pairs = [(before[name][key], after[name][key]) for key in ("soft", "exact", "format")]
        print(f"{name:20}" + "".join(f"    {a:6.3f}  {b:6.3f}" for a, b in pairs))


def run(cfg: Config) -> Path | None:
    """Everything from the flags to the pictures. Returns the output directory; None: a dry run."""
    check_attention(cfg, ranks.start())
    if cfg.jsonl_path:
        records, held_out = training_records(cfg), held_out_records(cfg)
    if cfg.dry_run:
        if ranks.is_main():
            plan.show(cfg, records) if cfg.jsonl_path else show_toy_flags(dry_run=True)
        return None
    directory = ranks.on_first(make_output_dir, cfg)
    is_toy = cfg.model_name_or_path is None
    if is_toy:
        cfg = toy_config(cfg, directory / "toy")
    resume = ranks.on_first(checkpoint.to_resume, cfg, directory)
    measures_file = directory / "eval.json"
    measures = ranks.on_first(read_measures, measures_file) if resume else {}
    if is_toy:
        ranks.on_first(make_toy, cfg, directory / "toy")
        records, held_out = training_records(cfg), held_out_records(cfg)

    torch.manual_seed(cfg.seed)
    transformers_logging.disable_progress_bar()
    policy = load_policy(cfg)
    if resume:
        checkpoint.check_fits(resume[0], policy)
    prompter = Prompter(
        policy.tokenizer, policy.chat_template, policy.geometry, cfg.question_type,
        cfg.fps, cfg.max_frames, cfg.min_pixels, cfg.max_pixels,
        max_prompt_length=policy.longest_prompt(cfg.max_prompt_length),
    )  # fmt: skip
    check_prompts(prompter, records, cfg.jsonl_path)
    check_prompts(prompter, held_out, cfg.eval_jsonl_path)
    with contextlib.closing(RunLog(cfg, directory, resume[1]["step"] if resume else 0)) as log:
        if held_out and "before" not in measures:
            measures["before"] = measure(cfg, policy, prompter, held_out)
            ranks.on_first(write_measures, measures_file, measures)
        steps = train(cfg, policy, records, prompter, log, resume)
    if held_out and steps == cfg.max_steps and measures.get("after_step") != steps:
        measures |= {"after_step": steps, "after": measure(cfg, policy, prompter, held_out)}
        ranks.on_first(write_measures, measures_file, measures)
    if ranks.is_main():
        pictures = ", ".join(map(str, curves.pictures(directory)))
        if held_out and measures.get("after_step") == steps:
            print_measures(measures["before"], measures["after"], len(held_out))
            if is_toy:
                print("A toy shows that the loop works, not that TW-GRPO beats GRPO.")
        print(f"\n{steps} steps done: {pictures}, {directory}/checkpoint-{steps}")
    return directory


def main() -> None:
    try:
        run(parse_config())
    except (UserError, VideoError, ranks.Failed) as error:
        raise SystemExit(f"error: {printable(str(error))}") from None
    except (ImportError, OSError) as error:
        raise SystemExit(f"error: {printable(str(error))}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; what was written so far is whole") from None


if __name__ == "__main__":
    ranks.run_script(main)
