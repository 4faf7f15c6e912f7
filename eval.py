"""Evaluates a policy: runs benchmarks, scores their logs, and answers single questions.

    python eval.py run --benchmark mmvu --model DIR --data FILE --video_root DIR --out LOG.jsonl
    python eval.py score LOG...
    python eval.py ask --model DIR --video FILE --question "..." [--options A B C]

`run` uses the same rollout as training, so it measures what is trained. Each answer is appended to
the log immediately, in the official format, so a killed run resumes where it stopped. Under
torchrun each rank takes every n-th question, and all append to the same log.

The answering loop is in run/answers.py, logs and scores are in tools/score.py, and prompt styles in
data.py; docs/prompts.md says which style belongs to which row of the paper.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging as transformers_logging

from data import STYLES, check_prompts
from files import UserError, one_sentence, printable
from model import ranks
from model.packing import Group
from model.policy import Policy, compute_dtype
from records import LETTERS, Record, load_records
from rewards import compare_answers, extract_answer, strict_format_reward, tagged_answer
from run import setup
from run.answers import answer
from run.config import Config, is_in
from run.decoder import ClipReader
from tools import score

# The prompt style that the paper uses to evaluate its model.
BENCHMARKS = {"clevrer": "r1_system", "dvd": "count"}
BENCHMARKS |= dict.fromkeys("nextgqa mmvu mvbench tempcompass videomme star".split(), "video_r1")
OF_TRAINING = (
    "max_completion_length fps max_frames min_pixels max_pixels max_prompt_length clip_timeout seed"
).split()
INTERVALS = {  # of the other numbers
    "temperature": "[0, 1e9]",
    "top_p": "(0, 1]",
    "repeat_frames": "[0, 9998]",
    "batch_size": "[1, 1e9]",
    "limit": "[1, 1e9]",
}
# Answers depend on these, so a log can only be continued with the same values.
DECIDES_ANSWERS = (
    "benchmark model prompt temperature top_p max_completion_length fps max_frames min_pixels "
    "max_pixels repeat_frames timing seed"
).split()


# ----------------------------------------------------------------------------------------- eval run


def run(args: argparse.Namespace, cfg: Config) -> None:
    """Answers the questions that are not in the log yet; each rank takes its share."""
    ranks.start()
    args.prompt = args.prompt or BENCHMARKS[args.benchmark]
    records = {score.question_key(r.row): r for r in load_records(args.data, args.video_root)}
    records = dict(itertools.islice(records.items(), args.limit))
    settings = {name: getattr(args, name) for name in DECIDES_ANSWERS}
    done = ranks.on_first(score.resume, args.out, settings)
    todo = [k for k, key in enumerate(records) if key not in done]
    if len(todo) < len(records) and ranks.is_main():
        before = len(records) - len(todo)
        print(f"{args.out}: {before} of {len(records)} answered before", flush=True)
    mine, answered = [k for k in todo if k % ranks.world() == ranks.rank()], 0
    for group in answers(args, cfg, list(records.values()), mine) if mine else ():
        score.append(args.out, log_row(group, args.prompt) | {"run": settings})
        answered += 1
    count, asked = map(sum, zip(*ranks.gather((answered, len(mine))), strict=True))
    if not count and not done:
        raise UserError(f"{args.data}: none of its {len(todo)} questions has a readable clip")
    if ranks.is_main():
        print(f"{count} questions answered, {asked - count} skipped\n", flush=True)
        print(score.table([score.read_log(args.out)]))


def log_row(group: Group, style: str) -> dict:
    """One line of the log. Its first seven keys are those of the official logs."""
    record, output = group.question.record, group.texts[0]
    # The general zero-shot evaluator compares the whole output, the others the extracted answer.
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


def answers(
    args: argparse.Namespace, cfg: Config, records: list[Record], places: list[int]
) -> Iterator[Group]:
    """Yields the answer to records[k] for every k in `places` whose clip can be read. The seed
    depends on k, so an answer is the same on any rank."""
    transformers_logging.disable_progress_bar()
    asked = [(records[k], records[k], (cfg.seed, k)) for k in places]
    device = ranks.start()
    policy = Policy.load(args.model, device, dtype=compute_dtype(device))
    with policy.gathered() as policy, ClipReader(cfg.clip_timeout) as reader:
        prompter = setup.make_prompter(
            cfg,
            policy,
            style=args.prompt,
            seconds_per_patch=1.0 if args.timing == "fixed" else None,
            repeat_frames=args.repeat_frames,
            load_clip=reader.load_clip,
        )
        check_prompts(prompter, records, args.data)
        yield from answer(cfg, policy, prompter, asked, args.batch_size, args.top_p)


# ---------------------------------------------------------------------------------------- eval ask


def ask(args: argparse.Namespace, cfg: Config) -> None:
    """Answers one question about one clip on the terminal."""
    if len(args.options) > len(LETTERS):
        raise UserError(f"--options takes at most {len(LETTERS)}")
    lines = [f"{a}. {option}" for a, option in zip(LETTERS, args.options, strict=False)]
    kind = "multiple choice" if lines else "numerical" if args.prompt == "count" else "free-form"
    problem = "\n".join([args.question, *lines])
    record = Record("asked", problem, "", Path(args.video), kind=kind)
    groups = list(answers(args, cfg, [record], [0]))
    if not groups:
        raise SystemExit(1)  # already reported: the clip cannot be read
    (group,) = groups
    cut = "" if group.finished[0] else ", cut off"
    print(printable(group.texts[0]))
    print(f"({len(group.completions[0])} tokens{cut}; prompt {len(group.question.ids_P)})")


# ------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="answer a benchmark's questions and log the answers")
    one.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    one.add_argument("--data", required=True, help="its questions, a JSON list or JSONL")
    one.add_argument("--video_root", default="", help="directory that video paths are relative to")
    one.add_argument("--out", required=True, help="log to append to; an existing one is resumed")
    one.add_argument("--prompt", choices=STYLES, help="default: the paper's for the benchmark")
    one.add_argument("--batch_size", type=int, default=16, help="maximum questions per batch")
    one.add_argument("--limit", type=int, help="only the first N questions")
    add_model_flags(one)
    one = commands.add_parser("score", help="accuracy of logs, this project's or official ones")
    one.add_argument("logs", nargs="+")
    one = commands.add_parser("ask", help="one question about one clip")
    one.add_argument("--video", required=True)
    one.add_argument("--question", required=True)
    one.add_argument("--options", nargs="*", default=[], help="texts, lettered A, B, C ...")
    one.add_argument("--prompt", choices=STYLES, default="think")
    one.set_defaults(data="--question", batch_size=1)
    add_model_flags(one)
    return top


def add_model_flags(command: argparse.ArgumentParser) -> None:
    """Flags for the model and its clips. Those shared with training are taken from there."""
    add = command.add_argument
    add("--model", required=True, help="Qwen3-VL, Qwen2.5-VL or Qwen2-VL checkpoint")
    add("--temperature", type=float, default=0.0, help="0: greedy; official: 0.1")
    add("--top_p", type=float, default=1.0, help="official: 0.001")
    add("--repeat_frames", type=int, default=0, help="show exactly this many frames; official: 16")
    told = "timing told to the model: the clip's own, or 1 s per temporal patch (official)"
    add("--timing", choices=("true", "fixed"), default="true", help=told)
    for field in dataclasses.fields(Config):
        if field.name in OF_TRAINING:
            help = f"{field.metadata['help']} ({field.default})"
            add(f"--{field.name}", type=field.type, default=field.default, help=help)


def config(args: argparse.Namespace) -> Config:
    """The flags shared with training. Raises UserError for any invalid flag."""
    cfg = Config(**{name: getattr(args, name) for name in OF_TRAINING})
    cfg.check()
    for name, interval in INTERVALS.items():
        value = getattr(args, name, None)
        if value is not None and not is_in(value, interval):
            raise UserError(f"--{name} {value} must be in {interval}")
    if args.repeat_frames % 2:
        raise UserError("--repeat_frames must be an even number")
    return dataclasses.replace(cfg, temperature=args.temperature, num_generations=1)


def main() -> None:
    args = parser().parse_args()
    with one_sentence("interrupted; rerun the command to resume"):
        if args.command == "score":
            print(score.table([score.read_log(path) for path in args.logs]))
        else:
            (run if args.command == "run" else ask)(args, config(args))


if __name__ == "__main__":
    ranks.run_script(main)
