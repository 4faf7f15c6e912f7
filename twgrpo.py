"""Train a video-language model with TW-GRPO: token-weighted group relative policy optimization.

    python twgrpo.py                  the built-in toy: tiny model, synthetic clips, no GPU
    python twgrpo.py --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct --jsonl_path train.json ...

`train_step` is the algorithm (arXiv 2505.24718; equation numbers refer to docs/equations.md) and
`train` is the loop around it. The network is in model/, the loss in kernels/, the rewards in
rewards.py, and the support code of the loop in run/. Shape letters are defined in
kernels/reference.py; here K is also the number of reward functions.
"""

import contextlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers.utils import logging as transformers_logging

from data import Prompter, Question, check_prompts
from files import UserError, one_sentence
from kernels import HeadOutput, LossOptions, tw_grpo_head
from model import ranks
from model.packing import Group
from model.policy import Policy
from records import Record
from rewards import REWARDS
from run import checkpoint, plan
from run.clips import QuestionsAhead
from run.config import Config, check_attention, held_out_records, parse_config, training_records
from run.held_out import Measures
from run.log import RunLog, phase
from run.setup import load_policy, make_optimizer, make_prompter, optimizer_step, prepare, rate
from tools import curves

# ------------------------------------------------------------------------------------ the algorithm


@dataclass
class Update:
    """What one optimizer step measured."""

    outputs: list[HeadOutput]  # one per question of this rank
    loss: float  # eq. 20, over all ranks
    grad_norm: float  # before clipping
    finite: bool  # False: the update was skipped


def train_step(
    cfg: Config,
    policy: Policy,
    reference: Policy | None,
    optimizer: Optimizer,
    questions: list[Question],
    seeds: list[tuple[int, ...]],
    learning_rate: float,
) -> tuple[list[Group], list[Update]]:
    """One step of TW-GRPO on this rank's questions: the groups it sampled, and its updates."""
    # Sample G completions per question from the full softmax. Eqs. 5, 6.
    groups = sample_groups(cfg, policy, questions, seeds)

    # Reward each completion for soft accuracy and format. Eqs. 1 to 3.
    # Normalise within the group: A = (r - mean) / std. Eq. 4.
    with ranks.alone():
        for group in groups:
            group.rewards_GK = rewards_of(cfg, group)
            group.advantages_G = group_advantages(group.rewards_GK.sum(-1))

    count = ranks.total(len(groups))  # questions in this step, over all ranks
    if reference and count:
        score_reference(cfg, reference, groups)

    updates = []
    for _ in range(cfg.num_iterations if count else 0):
        # Weight each position by how much the group disagrees there, clip the ratios and
        # backpropagate the weighted loss: eqs. 7 to 19. Every question counts 1 / count: eq. 20.
        total, outputs = 0.0, {}
        for chunk, teaches in micro_batches(cfg, groups):
            with torch.set_grad_enabled(teaches):
                chunk_loss, chunk_outputs = policy.run(score_groups, cfg, policy, chunk)
            if teaches:
                differentiate(chunk_loss, count)
            total += chunk_loss.item()
            outputs |= zip(map(id, chunk), chunk_outputs, strict=False)
        outputs = [outputs[id(group)] for group in groups]
        for group, output in zip(groups, outputs, strict=True):
            if group.old_logps_N is None:
                group.old_logps_N = output.logps_N  # later iterations take the ratio to these
        # Update the weights.
        loss = ranks.total(total) / count
        norm, finite = optimizer_step(cfg, policy, optimizer, loss, learning_rate)
        updates.append(Update(outputs, loss, norm, finite))
    return groups, updates


def train(
    cfg: Config,
    policy: Policy,
    records: list[Record],
    prompter: Prompter,
    log: RunLog,
    resume: tuple[Path, dict] | None = None,
) -> int:
    """The training loop, identical on every rank. Returns the number of steps done: max_steps, or
    fewer after a signal. `resume` is what `checkpoint.to_resume` returns."""
    reference = load_policy(cfg, freeze_all=True) if cfg.beta > 0 else None
    optimizer = make_optimizer(cfg, policy)
    if resume:
        checkpoint.load(resume[0], policy, optimizer)
    saver = checkpoint.Saver(cfg, policy, optimizer, log, resume)
    step, ending = saver.step, None
    ahead = QuestionsAhead(cfg, records, prompter, log, step + 1)

    with ranks.StopSignal() as stop, contextlib.closing(ahead), saver.rescuing():
        steps = log.progress(range(step + 1, cfg.max_steps + 1))
        for step in steps:
            with ranks.alone(), phase("data"):
                questions, seeds = ahead.take(step)
            lr = rate(cfg, step)
            groups, updates = train_step(cfg, policy, reference, optimizer, questions, seeds, lr)
            log.step(step, groups, updates, lr, policy.tokenizer)
            saver.finished(step)
            ending = log.reason_to_end(step)
            leaving = ending or ranks.agree(stop.requested) or step == cfg.max_steps
            if leaving or step % cfg.save_steps == 0:
                saver.save()
            if leaving:
                break
    if ending:
        raise UserError(f"{ending}; {saver.saved} holds the run so far")
    return step


# -------------------------------------------------------------------------- the parts of a step


@phase("rollout")
def sample_groups(
    cfg: Config, policy: Policy, questions: list[Question], seeds: list[tuple[int, ...]]
) -> list[Group]:
    """Samples G completions per question. Each video is encoded once and each prompt prefilled
    once; video features are kept for scoring if the vision tower is frozen."""
    with policy.gathered() as actor, ranks.alone():
        if not questions:
            return []
        with torch.no_grad():
            features = actor.encode_videos(questions)
        G, T = cfg.num_generations, cfg.max_completion_length
        groups = actor.rollout(questions, features, G, T, cfg.temperature, seeds)
        for group, tokens, seed in zip(groups, features, seeds, strict=True):
            group.features, group.seed = tokens if cfg.freeze_vision_modules else None, seed
        return groups


def rewards_of(cfg: Config, group: Group) -> Tensor:
    """The rewards of each completion: (G, K), columns in the order of cfg.reward_funcs."""
    solution = group.question.record.solution
    return torch.tensor(
        [[REWARDS[name](text, solution) for name in cfg.reward_funcs] for text in group.texts]
    )


def group_advantages(rewards_G: Tensor) -> Tensor:
    """Eq. 4: A_i = (r_i - mean r) / (std r + 1e-4) over the group: (G,); std has ddof = 1.

    If all rewards in a group are equal, its advantages are 0 and it contributes no gradient.
    """
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + 1e-4)


@phase("score")
def score_reference(cfg: Config, reference: Policy, groups: list[Group]) -> None:
    """Stores each group's log-probs under the reference model, for the KL term (eq. 11)."""
    for chunk, _ in micro_batches(cfg, groups):
        scored = chunk or [reference.idle_group()]
        logps = reference.run(reference.completion_logps, scored, cfg.temperature)
        for group, logps_N in zip(scored, logps, strict=True):
            group.ref_logps_N = logps_N


def micro_batches(cfg: Config, groups: list[Group]) -> list[tuple[list[Group], bool]]:
    """Chunks of at most B groups, each with a flag: does it need a gradient? Without a KL term,
    groups whose rewards are all equal do not; they are scored only for the log.

    With several ranks, each micro-batch is a round of collectives. So every rank gets the same
    number, some possibly empty, and runs a backward pass if any rank needs one.
    """
    B, per_rank = cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps

    def teaches(chunk: list[Group]) -> bool:
        return any(cfg.beta > 0 or bool(group.advantages_G.any()) for group in chunk)

    if ranks.world() > 1:
        chunks = [groups[k : k + B] for k in range(0, B * per_rank, B)]
        return [(chunk, ranks.agree(teaches(chunk))) for chunk in chunks]
    halves = [[g for g in groups if teaches([g]) == flag] for flag in (True, False)]
    chunks = [half[k : k + B] for half in halves for k in range(0, len(half), B)]
    return [(chunk, teaches(chunk)) for chunk in chunks]


@phase("score")
def score_groups(
    cfg: Config, policy: Policy, groups: list[Group]
) -> tuple[Tensor, list[HeadOutput]]:
    """Scores each question as one packed row. Returns the summed loss and each question's output.

    A rank with no questions scores an idle group: loss and gradient are 0, but every parameter
    takes part, because the other ranks wait for each one in their collectives.
    """
    scored, dtype = groups or [policy.idle_group()], policy.compute_dtype
    hidden = policy.hidden_states(scored)
    names = {field.name for field in fields(LossOptions)} - {"shuffle_seed"}
    options = {name: getattr(cfg, name) for name in names}
    if not groups:
        options["beta"] = 0.0  # no reference model has scored the idle group
    outputs = [
        tw_grpo_head(
            hidden_ND.to(dtype),
            policy.head_VD.to(dtype),
            group.targets_N.to(hidden_ND.device, non_blocking=True),
            group.lengths_G,
            group.advantages_G.to(hidden_ND.device, non_blocking=True),
            old_logps_N=group.old_logps_N,
            ref_logps_N=group.ref_logps_N,
            shuffle_seed=(*group.seed[:3], 6),  # 6: no other random stream uses it
            kept_share=1 / len(scored),
            **options,
        )
        for group, hidden_ND in zip(scored, hidden, strict=True)
    ]
    return torch.stack([o.loss for o in outputs]).sum(), outputs if groups else []


@phase("update")
def differentiate(loss: Tensor, count: float) -> None:
    """Eq. 20: accumulates the gradient of loss / count, summed over ranks (FSDP would average)."""
    (loss * (ranks.world() / count)).backward()


# --------------------------------------------------------------------------------------------- main


def train_and_evaluate(cfg: Config) -> Path | None:
    """A complete run, from flags to plots. Returns its directory, or None for a dry run."""
    device = ranks.start()
    if cfg.dry_run:
        ranks.on_first(plan.show, cfg)
        return None
    check_attention(cfg, device)
    is_toy = cfg.model_name_or_path is None
    if is_toy:
        # So that the numbers do not depend on the core count, and because OpenMP threads wait for
        # each other: with another process on one of two cores, two threads are 10 times slower.
        torch.set_num_threads(1)
    else:
        training_records(cfg), held_out_records(cfg)  # report bad rows before creating a directory
    cfg, directory, resume = ranks.on_first(prepare, cfg)
    records, held_out = training_records(cfg), held_out_records(cfg)
    measures = Measures(directory, resumed=resume is not None)

    torch.manual_seed(cfg.seed)
    transformers_logging.disable_progress_bar()
    policy = load_policy(cfg)
    prompter = make_prompter(cfg, policy)
    check_prompts(prompter, records, cfg.jsonl_path)
    check_prompts(prompter, held_out, cfg.eval_jsonl_path)
    log = RunLog(cfg, directory, resume and resume[1])
    if held_out and cfg.eval_on_start:
        measures.take("before", 0, cfg, policy, prompter, held_out)
    steps = train(cfg, policy, records, prompter, log, resume)
    measured = held_out and steps == cfg.max_steps
    if measured:
        measures.take("after", steps, cfg, policy, prompter, held_out)
    if ranks.is_main():
        pictures = ", ".join(map(str, curves.pictures(directory)))
        if measured:
            measures.print(len(held_out))
        if measured and is_toy:
            print("A toy shows that the loop works, not that TW-GRPO beats GRPO.")
        print(f"\n{steps} steps done: {pictures}, {directory}/checkpoint-{steps}")
    return directory


def main() -> None:
    with one_sentence("interrupted; no file is left half-written"):
        train_and_evaluate(parse_config())


if __name__ == "__main__":
    ranks.run_script(main)
