"""Evaluates a policy: answers benchmarks, scores the logs, and answers single questions.

    python eval.py run --benchmark mmvu --model DIR --data FILE --video_root DIR --out LOG.jsonl
    python eval.py score LOG...  [--markdown]
    python eval.py ask --model DIR --video FILE --question "..." [--options A B C] [--weights]

`run` answers with the rollout that training uses, so it measures what is trained. Each answer is
appended to the log at once, in the official logs' format, so a killed run resumes where it stopped.
Under torchrun each rank takes every n-th question, and all append to the same log.

The loop that answers is in run/answers.py, logs and scores are in tools/score.py, prompt styles in
data.py; docs/prompts.md says which style belongs to which row of the paper.
Letters in shapes: G completions, T positions, N completion tokens, D hidden size, V vocabulary.
"""

import argparse
import dataclasses
import itertools
import math
import os
import re
import sys
from collections.abc import Callable
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
from rewards import compare_answers, extract_answer, strict_format_reward, tagged_answer
from run import setup
from run.answers import answer
from run.config import Config
from run.decoder import ClipReader
from tools import score
from video import VideoError

BENCHMARKS = {  # -> the prompt style with which the paper evaluates its model
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


def run(args: argparse.Namespace) -> None:
    """Answers the questions that are not in the log yet, each rank its share of them."""
    ranks.start()
    style = args.prompt or BENCHMARKS[args.benchmark]
    records = {score.question_key(r.row): r for r in load_records(args.data, args.video_root)}
    records = dict(itertools.islice(records.items(), args.limit))
    settings = {"benchmark": args.benchmark, "model": args.model, "prompt": style}
    settings |= {name: getattr(args, name) for name in DECIDES_ANSWERS}
    with score.open_log(args.out, settings) as log:
        todo = [k for k, key in enumerate(records) if key not in log.done]
        if len(todo) < len(records) and ranks.is_main():
            before = len(records) - len(todo)
            print(f"{args.out}: {before} of {len(records)} answered before", flush=True)
        mine = [k for k in todo if k % ranks.world() == ranks.rank()]
        answered = answer_all(args, list(records.values()), mine, style, log) if mine else 0
        count, asked = map(sum, zip(*ranks.gather((answered, len(mine))), strict=True))
    if not count and not log.done:
        raise UserError(f"{args.data}: none of its {len(todo)} questions has a readable clip")
    if ranks.is_main():
        print(f"{count} questions answered, {asked - count} skipped", flush=True)
        scored = score.read_log(args.out)
        print(score.report(scored, score.summarize(scored)))


def answer_all(
    args: argparse.Namespace, records: list[Record], mine: list[int], style: str, log: score.RowLog
) -> int:
    """Answers records[k] for every k in `mine` into the log; returns how many were answered."""
    hits = []
    bar = tqdm(total=len(mine), desc=args.benchmark, disable=not ranks.is_main())
    with load_policy(args).gathered() as policy, ClipReader(args.timeout) as reader, bar:
        prompter = make_prompter(args, policy, style, reader)
        check_prompts(prompter, records, args.data)

        def use(group: Group) -> None:
            row = log_row(group, style)
            log.append(row)
            hits.append(row["accuracy_score"] == 1.0)
            bar.set_postfix(strict=f"{100 * np.mean(hits):.1f}", refresh=False)

        asked = [(records[k], records[k], (args.seed, k)) for k in mine]
        how = dict(batch_size=args.batch_size, top_p=args.top_p)
        return answer(config_of(args), policy, prompter, asked, use, bar, **how)


def log_row(group: Group, style: str) -> dict:
    """One line of the log. Its first seven keys are those of the official logs."""
    record, output = group.question.record, group.texts[0]
    # The general zero-shot evaluator compares the whole output, the others what they extract.
    given = output.strip() if style == "direct_letter" else extract_answer(output)
    _, opening, rest = output.partition("<think>")
    thought, closing, _ = rest.partition("</think>")
    return {
        "question": record.row,
        "ground_truth": record.solution,
        "model_output": output,
        "extracted_answer": given,
        "think_content": thought.strip() if opening and closing else "",
        "accuracy_score": compare_answers(given, tagged_answer(record.solution)),
        "format_score": strict_format_reward(output),
        "tokens": len(group.completions[0]),
        "finished": group.finished[0],
        "prompt_tokens": len(group.question.ids_P),
        "video_grid": list(group.question.grid),
        "seconds_between_frames": round(group.question.seconds, 6),
    }


def load_policy(args: argparse.Namespace) -> Policy:
    transformers_logging.disable_progress_bar()
    return Policy.load(args.model, ranks.start(), freeze_vision_modules=True)


def make_prompter(
    args: argparse.Namespace, policy: Policy, style: str, reader: ClipReader
) -> Prompter:
    return setup.make_prompter(
        config_of(args),
        policy,
        style=style,
        seconds_per_patch=1.0 if args.timing == "fixed" else None,
        repeat_frames=args.repeat_frames,
        load_clip=reader.load_clip,
    )


def config_of(args: argparse.Namespace) -> Config:
    """The flags that training has too. Here temperature may be 0, for greedy decoding."""
    shared = {field.name for field in dataclasses.fields(Config)} & vars(args).keys()
    return Config(**{name: getattr(args, name) for name in shared})


# ----------------------------------------------------------------------------------------- eval ask


def ask(args: argparse.Namespace) -> None:
    """One question about one clip, answered on the terminal."""
    lines = [f"{a}. {option}" for a, option in zip(LETTERS, args.options, strict=False)]
    kind = "multiple choice" if lines else "numerical" if args.prompt == "count" else "free-form"
    problem = "\n".join([args.question, *lines])
    record = Record("asked", problem, "", Path(args.video), kind=kind)
    with load_policy(args).gathered() as policy, ClipReader(args.timeout) as reader:
        question = make_prompter(args, policy, args.prompt, reader)(record)
        print(shown_clip(policy, question))
        cfg = config_of(args)
        answer_alone = dataclasses.replace(cfg, num_generations=1)
        group = sample(answer_alone, policy, question, (args.seed,), args.top_p)
        print(dimmed_think(group.texts[0], sys.stdout.isatty() and "NO_COLOR" not in os.environ))
        print(f"{len(group.completions[0])} tokens{'' if group.finished[0] else ', cut off'}")
        if args.weights:
            cfg.temperature = cfg.temperature or 1.0  # and no top_p, as in training
            print(weights_table(cfg, policy, sample(cfg, policy, question, (args.seed, 1))))


def shown_clip(policy: Policy, question: Question) -> str:
    (t, h, w), geometry = question.grid, policy.geometry
    return (
        f"{t * geometry.temporal_patch_size} frames of {w * geometry.patch_size} x "
        f"{h * geometry.patch_size} pixels, {question.seconds:.2f} s apart: "
        f"{t * h * w // geometry.merge_size**2} video tokens in a prompt of {len(question.ids_P)}"
    )


@torch.no_grad()
def sample(
    cfg: Config, policy: Policy, question: Question, seed: tuple[int, ...], top_p: float = 1.0
) -> Group:
    features, length = policy.encode_videos([question]), cfg.max_completion_length
    how = (cfg.num_generations, length, cfg.temperature, [seed], top_p)
    return policy.rollout([question], features, *how)[0]


def dimmed_think(text: str, colours: bool) -> str:
    """The text, printable, its think part in dim letters."""
    dim = "\x1b[2m\\g<0>\x1b[0m" if colours else "\\g<0>"
    return re.sub("<think>.*?(</think>|$)", dim, printable(text), count=1, flags=re.DOTALL)


@torch.no_grad()
def weights_table(cfg: Config, policy: Policy, group: Group) -> str:
    """The token weights of a group: a line for each position t with w_t, D_t in nats and the token
    of each completion ("." after its end)."""
    features = policy.encode_videos([group.question])
    (hidden_ND,) = policy.hidden_states([group], features)
    device = hidden_ND.device
    output = tw_grpo_head(
        hidden_ND, policy.head_VD.to(hidden_ND.dtype), group.targets_N.to(device),
        group.lengths_G.to(device), torch.zeros(len(group.completions), device=device),
        alpha=cfg.alpha, temperature=cfg.temperature,
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

DECIDES_ANSWERS = (
    "temperature top_p max_completion_length fps max_frames min_pixels max_pixels".split()
)
DECIDES_ANSWERS += ["repeat_frames", "timing", "seed"]


def within(low: float, high: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: a finite number from `low` to `high`; whole numbers if `low` is one."""

    def number(text: str) -> float:
        value = type(low)(text)
        if not low <= value <= high or math.isinf(value):
            bounds = f"at least {low:,}" if high == math.inf else f"in {low:,}..{high:,}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, and finite")
        return value

    return number


def add_model_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", required=True, help="Qwen3-VL, Qwen2.5-VL or Qwen2-VL checkpoint")
    add("--temperature", type=within(0.0), default=0.0, help="0: greedy; official: 0.1")
    add("--top_p", type=within(1e-9, 1.0), default=1.0, help="official: 0.001")
    add("--max_completion_length", type=within(1, 131_072), default=1024, help="official: 4096")
    add("--fps", type=within(1e-9), default=video.FPS, help="frames sampled per second")
    add("--max_frames", type=within(2, 9_999), default=video.MAX_FRAMES, help="at most")
    add("--min_pixels", type=within(1), default=video.MIN_PIXELS, help="per frame, at least")
    add("--max_pixels", type=within(1), default=video.MAX_PIXELS, help="per frame, at most")
    add("--max_prompt_length", type=within(1), default=MAX_PROMPT_LENGTH, help="tokens, at most")
    add("--repeat_frames", type=within(0, 9_998), default=0, help="exactly so many; official: 16")
    told = "what the model is told of time: the clip's own, or 1 s per temporal patch (official)"
    add("--timing", choices=("true", "fixed"), default="true", help=told)
    add("--timeout", type=within(1e-9, 86_400.0), default=60.0, help="seconds to decode a clip in")
    add("--seed", type=within(0), default=42, help="of sampling")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="answer the questions of a benchmark, into a log")
    one.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    one.add_argument("--data", required=True, help="its questions, a JSON list or JSONL")
    one.add_argument("--video_root", default="", help="directory the video paths start from")
    one.add_argument("--out", required=True, help="log to append to; an existing one is resumed")
    one.add_argument("--prompt", choices=STYLES, help="default: the paper's for the benchmark")
    one.add_argument("--batch_size", type=within(1), default=16, help="questions at once, at most")
    one.set_defaults(num_generations=1)
    one.add_argument("--limit", type=within(1), help="only the first so many questions")
    add_model_flags(one)
    one = commands.add_parser("score", help="accuracy of logs, this project's or the official ones")
    one.add_argument("logs", nargs="+")
    one.add_argument("--markdown", action="store_true", help="one table of all logs")
    one.add_argument("--resamples", type=within(1, 10**6), default=1000, help="of the bootstrap")
    one = commands.add_parser("ask", help="one question about one clip")
    one.add_argument("--video", required=True)
    one.add_argument("--question", required=True)
    one.add_argument("--options", nargs="*", default=[], help="texts, lettered A, B, C ...")
    one.add_argument("--prompt", choices=STYLES, default="think")
    one.add_argument("--weights", action="store_true", help="also sample G answers and weigh them")
    one.add_argument("--num_generations", type=within(2, 1024), default=8, help="G, for --weights")
    one.add_argument("--alpha", type=within(1.0), default=1.7, help="upper bound of the weights")
    add_model_flags(one)
    return top


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError on flags that make no sense, other than a number out of its bounds."""
    flags = dict(min_pixels=1, max_pixels=1, repeat_frames=0, question="", options=[]) | vars(args)
    if flags["min_pixels"] > flags["max_pixels"]:
        raise UserError("--min_pixels must not be above --max_pixels")
    if flags["repeat_frames"] % 2:
        raise UserError("--repeat_frames must be an even number")
    if len(flags["options"]) > len(LETTERS):
        raise UserError(f"--options takes at most {len(LETTERS)}")
    if re.search("[\ud800-\udfff]", flags["question"] + "".join(flags["options"])):
        raise UserError("--question and --options must be UTF-8 text")


def main() -> None:
    args = parser().parse_args()
    try:
        check_flags(args)
        if args.command == "score":
            logs = [score.read_log(path) for path in args.logs]
            scored = [(log, score.summarize(log, args.resamples)) for log in logs]
            texts = [score.report(*pair) for pair in scored]
            print(score.markdown(scored) if args.markdown else "\n\n".join(texts))
        else:
            (run if args.command == "run" else ask)(args)
    except (UserError, VideoError, ranks.Failed) as error:
        raise SystemExit(f"error: {printable(str(error))}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command resumes a run") from None


if __name__ == "__main__":
    ranks.run_script(main)
