"""How good a policy's answers are: benchmarks, scores of their logs, and one question at a time.

    python eval.py run --benchmark mmvu --model DIR --data FILE --video_root DIR --out LOG.jsonl
    python eval.py score LOG...  [--markdown]
    python eval.py ask --model DIR --video FILE --question "..." [--options A B C] [--weights]

`run` answers every question with the policy's own rollout, so what is measured is what is trained.
Each answer is one line of the log, in the official logs' form, written the moment it exists: a run
killed at any point goes on where it stopped. Under torchrun each rank takes every n-th question,
and all append to the one log. Logs are written and scored in tools/score.py.

Prompt styles are in data.py; which of them gives which row of the paper is in docs/prompts.md.
Letters in shapes: B questions answered together, G completions of each, T positions.
"""

import argparse
import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import video
from data import MAX_PROMPT_LENGTH, STYLES, Prompter, Question, check_prompts
from files import UserError
from kernels import tw_grpo_head
from model import ranks
from model.packing import Group
from model.policy import Policy
from records import LETTERS, Record, load_records, printable
from rewards import (
    compare_answers,
    extract_answer,
    strict_format_reward,
    tagged_answer,
)
from run.decoder import ClipReader
from tools import score
from video import VideoError

BENCHMARKS = {  # the prompt style with which the paper evaluates its model on each
    "clevrer": "r1_system",
    "nextgqa": "video_r1",
    "mmvu": "video_r1",
    "mvbench": "video_r1",
    "tempcompass": "video_r1",
    "videomme": "video_r1",
    "star": "video_r1",
    "dvd": "count",
}


# ----------------------------------------------------------------------------------------- eval run


def ahead(items: Iterable, work: Callable, depth: int) -> Iterator:
    """work(item) for every item in order, up to `depth` of them done ahead in one thread."""
    pool, waiting = ThreadPoolExecutor(1), deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # whoever stops early does not wait for the rest


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def answered(
    prepared: Iterable, generate: Callable[[list], list[Group]], batch_size: int
) -> Iterator[Group]:
    """Groups of all prepared questions, `batch_size` at a time, in order.

    When a batch does not fit in memory, it is halved, and those after it stay as small. Raises
    UserError if one question alone does not fit.
    """
    source, waiting = iter(prepared), []
    while True:
        while len(waiting) < batch_size and (item := next(source, None)) is not None:
            waiting.append(item)
        if not waiting:
            return
        batch, failed = waiting[:batch_size], False
        try:
            groups = generate(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        if failed:  # outside the handler, which keeps the failed batch's tensors alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(batch) == 1:
                raise UserError(
                    "one question alone does not fit in memory; lower --max_pixels, --max_frames "
                    "or --max_completion_length"
                )
            batch_size = len(batch) // 2
            tqdm.write(f"out of memory: {batch_size} questions at a time from here", sys.stderr)
            continue
        waiting = waiting[len(batch) :]
        yield from groups


def log_row(group: Group, style: str) -> dict:
    """One line of the log, its first seven keys those of the official logs."""
    record, output = group.question.record, group.texts[0]
    # The general zero-shot evaluator compares the whole output, the others what they extract.
    answer = output.strip() if style == "direct_letter" else extract_answer(output)
    _, opening, rest = output.partition("<think>")
    thought, closing, _ = rest.partition("</think>")
    return {
        "question": record.row,
        "ground_truth": record.solution,
        "model_output": output,
        "extracted_answer": answer,
        "think_content": thought.strip() if opening and closing else "",
        "accuracy_score": compare_answers(answer, tagged_answer(record.solution)),
        "format_score": strict_format_reward(output),
        "tokens": len(group.completions[0]),
        "finished": group.finished[0],
        "prompt_tokens": len(group.question.ids_P),
        "video_grid": list(group.question.grid),
        "seconds_between_frames": round(group.question.seconds, 6),
    }


def run(args: argparse.Namespace) -> None:
    """Answers the questions that the log does not hold yet, each rank its share of them."""
    ranks.start()
    style = args.prompt or BENCHMARKS[args.benchmark]
    records = list({score.question_key(r.row): r for r in load_records(
        args.data, args.video_root)}.values())[: args.limit]  # fmt: skip
    settings = {"benchmark": args.benchmark, "model": args.model, "prompt": style}
    settings |= {k: getattr(args, k) for k in DECIDES_ANSWERS}
    with score.open_log(args.out, settings) as log:
        keys = [score.question_key(r.row) for r in records]
        todo = [(k, r) for k, r in enumerate(records) if keys[k] not in log.done]
        if len(todo) < len(records) and ranks.is_main():
            before = len(records) - len(todo)
            print(f"{args.out}: {before} of {len(records)} answered before", flush=True)
        mine = [(k, r) for k, r in todo if k % ranks.world() == ranks.rank()]
        counts = answer_all(args, records, mine, style, log) if mine else (0, 0)
        count, skipped = map(sum, zip(*ranks.gather(counts), strict=True))
    if not count and not log.done:
        raise UserError(f"{args.data}: none of its {len(todo)} questions could be shown")
    if ranks.is_main():
        print(f"{count} questions answered, {skipped} skipped", flush=True)
        scored = score.read_log(args.out)
        print(score.report(scored, score.summarize(scored)))


def answer_all(
    args: argparse.Namespace, records: list[Record], todo: list, style: str, log: score.RowLog
) -> tuple[int, int]:
    """Answers this rank's questions into the log; how many were answered, and how many skipped."""
    skipped, hits = [], []
    with load_policy(args).gathered() as policy, ClipReader(args.timeout) as reader:
        prompter = make_prompter(args, policy, style, reader)
        check_prompts(prompter, records, args.data)
        bar = tqdm(total=len(todo), desc=args.benchmark, disable=not ranks.is_main())

        def prepare(item):
            k, record = item
            try:
                return prompter(record), (args.seed, k)
            except VideoError as error:
                skipped.append(record.id)
                note = printable(f"skipped question {record.id}: {error}")
                tqdm.write(note, file=sys.stderr)
                bar.update()

        def generate(batch):
            questions, seeds = [q for q, _ in batch], [s for _, s in batch]
            return rollout(policy, questions, seeds, args)

        with contextlib.closing(ahead(todo, prepare, args.batch_size)) as prepared:
            readable = (question for question in prepared if question is not None)
            for group in answered(readable, generate, args.batch_size):
                row = log_row(group, style)
                log.append(row)
                hits.append(row["accuracy_score"] == 1.0)
                bar.update()
                bar.set_postfix(strict=f"{100 * np.mean(hits):.1f}", refresh=False)
        bar.close()
    return len(hits), len(skipped)


def load_policy(args: argparse.Namespace) -> Policy:
    transformers_logging.disable_progress_bar()
    return Policy.load(args.model, ranks.start(), freeze_vision_modules=True)


def make_prompter(
    args: argparse.Namespace, policy: Policy, style: str, reader: ClipReader
) -> Prompter:
    return Prompter(
        policy.tokenizer, policy.chat_template, policy.geometry, "mixed",
        args.fps, args.max_frames, args.min_pixels, args.max_pixels,
        style=style,
        seconds_per_patch=1.0 if args.timing == "fixed" else None,
        repeat_frames=args.repeat_frames,
        load_clip=reader.load_clip,
        max_prompt_length=policy.longest_prompt(args.max_prompt_length),
    )  # fmt: skip


@torch.no_grad()
def rollout(policy: Policy, questions: list, seeds: list, args, G: int = 1) -> list[Group]:
    features = policy.encode_videos(questions)
    return policy.rollout(
        questions, features, G, args.max_completion_length, args.temperature, seeds, args.top_p
    )


# ----------------------------------------------------------------------------------------- eval ask


def ask(args: argparse.Namespace) -> None:
    """One question about one clip, answered on the terminal."""
    lines = [f"{a}. {option}" for a, option in zip(LETTERS, args.options, strict=False)]
    kind = "multiple choice" if lines else "numerical" if args.prompt == "count" else "free-form"
    problem = "\n".join([args.question, *lines])
    record = Record("asked", problem, "", Path(args.video), kind=kind)
    with load_policy(args).gathered() as policy, ClipReader(args.timeout) as reader:
        question = make_prompter(args, policy, args.prompt, reader)(record)
        show_answer(args, policy, question)


def show_answer(args: argparse.Namespace, policy: Policy, question: Question) -> None:
    t, h, w = question.grid
    size = policy.geometry.patch_size
    print(
        f"{t * policy.geometry.temporal_patch_size} frames of {w * size} x {h * size} pixels, "
        f"{question.seconds:.2f} s apart: {t * h * w // policy.geometry.merge_size**2} video "
        f"tokens in a prompt of {len(question.ids_P)}"
    )
    groups = rollout(policy, [question], [(args.seed,)], args)
    print(dimmed_think(groups[0].texts[0], sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    end = "" if groups[0].finished[0] else ", cut off"
    print(f"{len(groups[0].completions[0])} tokens{end}")
    if args.weights:
        args.temperature, args.top_p = args.temperature or 1.0, 1.0  # as in training
        (group,) = rollout(policy, [question], [(args.seed, 1)], args, args.num_generations)
        print(weights_table(policy, group, args.alpha, args.temperature))


def dimmed_think(text: str, colours: bool) -> str:
    """The text, printable, its think part in dim letters."""
    text = printable(text)
    if not colours:
        return text
    before, opening, rest = text.partition("<think>")
    thought, closing, after = rest.partition("</think>")
    return f"{before}\x1b[2m{opening}{thought}{closing}\x1b[0m{after}"


@torch.no_grad()
def weights_table(policy: Policy, group: Group, alpha: float, temperature: float) -> str:
    """The token weights of a group: a line for each position t with w_t, D_t (nats) and what each
    completion says there ("." where it has ended)."""
    features = policy.encode_videos([group.question])
    (hidden_ND,) = policy.hidden_states([group], features)
    device = hidden_ND.device
    output = tw_grpo_head(
        hidden_ND, policy.head_VD.to(hidden_ND.dtype), group.targets_N.to(device),
        group.lengths_G.to(device), torch.zeros(len(group.completions), device=device),
        alpha=alpha, temperature=temperature,
    )  # fmt: skip
    lines = [f"{'t':>4} {'w_t':>6} {'D_t':>10}  tokens of the {len(group.completions)} answers"]
    for t, (weight, spread) in enumerate(
        zip(output.weights_T.tolist(), output.divergence_T.tolist(), strict=True)
    ):
        words = [
            score.one_line(policy.tokenizer.decode([int(c[t])]), 20) if t < len(c) else "."
            for c in group.completions
        ]
        lines.append(f"{t:4} {weight:6.3f} {spread:10.4g}  {' | '.join(words)}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- command line

DECIDES_ANSWERS = ("temperature", "top_p", "max_completion_length", "fps", "max_frames",
                   "min_pixels", "max_pixels", "repeat_frames", "timing", "seed")  # fmt: skip


def add_model_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", required=True, help="Qwen2.5-VL or Qwen2-VL checkpoint")
    add("--temperature", type=float, default=0.0, help="0: greedy; official: 0.1")
    add("--top_p", type=float, default=1.0, help="official: 0.001")
    add("--max_completion_length", type=int, default=1024, help="tokens; official: 4096")
    add("--fps", type=float, default=video.FPS, help="frames sampled per second")
    add("--max_frames", type=int, default=video.MAX_FRAMES, help="frames, at most")
    add("--min_pixels", type=int, default=video.MIN_PIXELS, help="per frame, at least")
    add("--max_pixels", type=int, default=video.MAX_PIXELS, help="per frame, at most")
    add("--max_prompt_length", type=int, default=MAX_PROMPT_LENGTH, help="longer ones are skipped")
    add("--repeat_frames", type=int, default=0, help="exactly so many frames; official: 16")
    told = "the seconds the model is told: the clip's, or 1 per temporal patch (official)"
    add("--timing", choices=("true", "fixed"), default="true", help=told)
    add("--timeout", type=float, default=60, help="seconds to decode a clip, at most")
    add("--seed", type=int, default=42, help="of sampling")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="answer the questions of a benchmark, into a log")
    one.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    one.add_argument("--data", required=True, help="its questions, a JSON list or JSONL")
    one.add_argument("--video_root", default="", help="directory the video paths start from")
    one.add_argument("--out", required=True, help="log to append to; an existing one is resumed")
    one.add_argument("--prompt", choices=STYLES, help="default: the paper's for the benchmark")
    one.add_argument("--batch_size", type=int, default=16, help="questions together, at most")
    one.add_argument("--limit", type=int, help="only the first so many questions")
    add_model_flags(one)
    one = commands.add_parser("score", help="accuracy of logs, this project's or the official ones")
    one.add_argument("logs", nargs="+")
    one.add_argument("--markdown", action="store_true", help="one table of all logs")
    one.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    one = commands.add_parser("ask", help="one question about one clip")
    one.add_argument("--video", required=True)
    one.add_argument("--question", required=True)
    one.add_argument("--options", nargs="*", default=[], help="texts, lettered A, B, C ...")
    one.add_argument("--prompt", choices=STYLES, default="think")
    one.add_argument("--weights", action="store_true", help="also sample G answers and weigh them")
    one.add_argument("--num_generations", type=int, default=8, help="G, for --weights")
    one.add_argument("--alpha", type=float, default=1.7, help="upper bound of the weights")
    add_model_flags(one)
    return top


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError on a flag that makes no sense."""
    options = getattr(args, "options", [])
    rules = {
        "--resamples must be in 1..1,000,000": getattr(args, "resamples", 1) in range(1, 1_000_001),
        "--batch_size must be at least 1": getattr(args, "batch_size", 1) >= 1,
        "--limit must be at least 1": getattr(args, "limit", None) is None or args.limit >= 1,
        "--num_generations must be in 2..1,024": (
            getattr(args, "num_generations", 2) in range(2, 1025)
        ),
        "--options takes at most 26": len(options) <= 26,
        "--question and --options must be UTF-8 text": not any(
            "\ud800" <= c <= "\udfff" for c in getattr(args, "question", "") + "".join(options)
        ),
        "--alpha must be at least 1, and finite": 1 <= getattr(args, "alpha", 1) < np.inf,
    }
    if args.command != "score":
        rules |= {
            "--temperature must be 0 or more, and finite": 0 <= args.temperature < np.inf,
            "--seed must be 0 or more": args.seed >= 0,
            "--top_p must be above 0 and at most 1": 0 < args.top_p <= 1,
            "--max_completion_length must be in 1..131,072": (
                args.max_completion_length in range(1, 131_073)
            ),
            "--max_prompt_length must be at least 1": args.max_prompt_length >= 1,
            "--fps must be above 0, and finite": 0 < args.fps < np.inf,
            "--max_frames must be in 2..9,999": args.max_frames in range(2, 10_000),
            "--min_pixels must be in 1..max_pixels": 0 < args.min_pixels <= args.max_pixels,
            "--repeat_frames must be 0 or an even number": args.repeat_frames in range(0, 9999, 2),
            "--timeout must be above 0 and at most 86,400": 0 < args.timeout <= 86_400,
        }
    for message, holds in rules.items():
        if not holds:
            raise UserError(message)


def main() -> None:
    args = parser().parse_args()
    try:
        check_flags(args)
        if args.command == "run":
            run(args)
        elif args.command == "ask":
            ask(args)
        else:
            logs = [score.read_log(path) for path in args.logs]
            scored = [(log, score.summarize(log, args.resamples)) for log in logs]
            texts = [score.report(*pair) for pair in scored]
            print(score.markdown(scored) if args.markdown else "\n\n".join(texts))
    except (UserError, VideoError, ranks.Failed) as error:
        raise SystemExit(f"error: {printable(str(error))}") from None
    except KeyboardInterrupt:
        raise SystemExit(
            "interrupted; a run goes on where it stopped if it is given again"
        ) from None


if __name__ == "__main__":
    ranks.run_script(main)
