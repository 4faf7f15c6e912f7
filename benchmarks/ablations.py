"""What the settings of the objective change on the toy: one table, one figure.

    python -m benchmarks.ablations
    python -m benchmarks.ablations --settings alpha_1 alpha_1.7 --seeds 0 1 2 3 --max_steps 200

Each run is an ordinary `python twgrpo.py` on one thread, `--jobs` at a time. All settings of a seed
share one toy world (clips, questions, warm-started model), the order of the questions and the
sampling noise, so settings are compared within a seed, by their difference to alpha 1.

Writes OUT.json, OUT.md and OUT.png; the runs stay in the work directory. Run again, the command
makes only what is missing. If a run fails, the others go on, the table names it, and the exit code
is 1. Ctrl-C, SIGTERM and SIGHUP end the runs and the command, also with exit code 1.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import toy
from benchmarks.origin import PROJECT, provenance, source
from files import replacing
from tools import curves

BASE = "alpha_1"  # token-normalised GRPO: all weights are 1
SETTINGS = {  # flags of twgrpo.py
    "grpo": "--loss_type grpo --alpha 1",
    "alpha_1": "--alpha 1",
    "null": "--alpha 1.0001",  # the control: weights that change next to nothing
    "alpha_1.4": "--alpha 1.4",
    "alpha_1.7": "--alpha 1.7",
    "alpha_2": "--alpha 2",
    "exclude": "--alpha 1.7 --ended_rows exclude",
    "textbook": "--alpha 1.7 --divergence textbook",
}
MEASURES = {  # heading in the table, decimals
    "training_accuracy": ("training accuracy", 3),
    "sampled_soft": ("sampled soft", 3),
    "greedy_soft": ("greedy soft", 3),
    "wrong_video_soft": ("wrong video", 3),
    "completion_length": ("tokens", 1),
    "weight_mean": ("weight", 3),
}
PAIRED = ("training_accuracy", "sampled_soft")  # also shown as differences to alpha 1
MAKE_WORLD = "import pathlib, sys, toy; toy.prepare(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"


# --------------------------------------------------------------------------------------------- runs


class Stop:
    """Has a signal asked to stop? A handler that only sets a flag cannot disturb what it meets."""

    asked = False

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's choice stays
                signal.signal(number, self.ask)

    def ask(self, *_) -> None:
        self.asked = True


def world_command(out: Path, seed: int) -> list[str]:
    return [sys.executable, "-c", MAKE_WORLD, str(out), str(seed)]


def run_command(out: Path, seed: int, setting: str, max_steps: int) -> list[str]:
    """`twgrpo.py` with the toy's own settings, and no checkpoint before the last step."""
    world = out.parent / "world"
    flags = toy.DEFAULTS | dict(
        seed=seed,
        max_steps=max_steps,
        save_steps=max_steps,
        save_only_model=True,
        model_name_or_path=world / "model",
        jsonl_path=world / "train.jsonl",
        eval_jsonl_path=world / "test.jsonl",
        video_root=world,
        output_dir=out,
    )
    pairs = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "twgrpo.py", *pairs, *SETTINGS[setting].split()]


def record(out: Path) -> dict | None:
    """Command, commit and CPU seconds of a finished run or world; None if it is not finished."""
    path = Path(f"{out}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def wait(process: subprocess.Popen, stop: Stop) -> tuple[int, float]:
    """Exit code and CPU seconds of a child; when asked to stop, kills it with its own children."""
    pid = 0
    while not pid:
        time.sleep(0.1)
        if stop.asked:
            os.killpg(process.pid, signal.SIGKILL)
        pid, status, usage = os.wait4(process.pid, 0 if stop.asked else os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def make(out: Path, command: list[str], stop: Stop) -> str | None:
    """One run or world from its start, in a thread of the pool; why it failed, or None."""
    if stop.asked:
        return "interrupted"
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)  # what a killed attempt left
    about, log = dict(command=command, **source()), Path(f"{out}.log")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10"}
    with open(log, "w", encoding="utf-8") as file:
        # In a session of its own, Ctrl-C reaches it only through `wait`.
        options = dict(cwd=PROJECT, env=environment, stdout=file, stderr=file)
        process = subprocess.Popen(command, start_new_session=True, **options)
        code, seconds = wait(process, stop)
    if code == 0:
        with replacing(Path(f"{out}.json")) as beside:
            beside.write_text(json.dumps(about | dict(cpu_seconds=seconds)), encoding="utf-8")
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"exit code {code}, log {log}", *[x for x in lines if x.strip()][-5:]])


def make_all(commands: dict[Path, list[str]], jobs: int, stop: Stop) -> bool:
    """Makes what is missing, a line for each that ends; whether all of them are there now.
    The main thread, which signals interrupt, only waits and prints."""
    todo = {out: command for out, command in commands.items() if not record(out)}
    print(f"{len(commands) - len(todo)} of {len(commands)} are there", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            ends = {pool.submit(make, *job, stop): job[0] for job in todo.items()}
            for k, end in enumerate(as_completed(ends), 1):
                if not stop.asked:
                    name = f"{ends[end].name}, {ends[end].parent.name}"
                    print(f"[{k}/{len(todo)}] {name}: {end.result() or 'done'}", flush=True)
        except BaseException:  # a closed pipe, say: leave nothing running
            stop.ask()
            raise
    return all(map(record, commands))


# ------------------------------------------------------------------------------------------ numbers


def numbers_of(out: Path) -> dict:
    """A finished run: shares in [0, 1], tokens, weights, CPU seconds."""
    rows = curves.read_metrics(out)
    measures = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    after = measures["after"]
    size, tenth = max(1, len(rows) // 20), max(1, len(rows) // 10)
    return dict(
        setting=out.name,
        seed=int(out.parent.name.removeprefix("seed")),
        **record(out),
        measures=dict(
            training_accuracy=fmean(accuracy),
            sampled_soft=after["sampled"]["soft"],
            greedy_soft=after["greedy"]["soft"],
            wrong_video_soft=after["wrong video"]["soft"],
            completion_length=fmean(row["completion_length"] for row in rows[-tenth:]),
            weight_mean=fmean(row["weight_mean"] for row in rows),
        ),
        eval=measures,
        curve=[fmean(accuracy[k : k + size]) for k in range(0, len(rows), size)],
        curve_steps_per_point=size,
    )


def spread(values: list[float]) -> dict | None:
    return dict(mean=fmean(values), min=min(values), max=max(values)) if values else None


def summary(runs: list[dict], settings: list[str]) -> dict:
    """What the table shows: each measure of each setting, and differences within a seed."""
    values = {(run["setting"], run["seed"]): run["measures"] for run in runs}
    table, differences = {}, {}
    for name in settings:
        mine = {seed: v for (setting, seed), v in values.items() if setting == name}
        base = {seed: values[BASE, seed] for seed in mine if (BASE, seed) in values}
        table[name] = {m: spread([v[m] for v in mine.values()]) for m in MEASURES}
        differences[name] = {m: spread([mine[s][m] - base[s][m] for s in base]) for m in PAIRED}
    return dict(table=table, differences_to_alpha_1=differences)


# --------------------------------------------------------------------------------- table and figure


def cell(value: dict | None, decimals: int, sign: str = "") -> str:
    if value is None:
        return "none"
    mean, low, high = (f"{x:{sign}.{decimals}f}" for x in (fmean(values), min(values), max(values)))
    return f"{mean}<br>{low} to {high}"


def table_rows(data: dict) -> list[list[str]]:
    """The table, its head first; a difference stands to the right of its measure."""
    head, rows = ["setting"], []
    for measure, (heading, _) in MEASURES.items():
        head += [heading] + ["difference to alpha 1"] * (measure in PAIRED)
    for name, values in data["table"].items():
        row = [f"`{SETTINGS[name]}`"]
        for measure, (_, decimals) in MEASURES.items():
            row.append(cell(values[measure], decimals))
            if measure in PAIRED:
                differences = values_of(data, name, measure, minus=BASE)
                row.append("0" if name == BASE else cell(differences, decimals, "+"))
    return [head, *rows]


def markdown(data: dict, out: Path) -> str:
    head, *rows = ["| " + " | ".join(row) + " |" for row in table_rows(data)]
    commits = {f"{r['commit']}{' with changes' * bool(r['dirty'])}" for r in data["runs"]}
    before = [run["eval"]["before"]["sampled"]["soft"] for run in data["runs"]]
    seeds = ", ".join(map(str, data["seeds"]))
    return f"""# Ablation on the toy

`python -m benchmarks.ablations`: {len(data["runs"])} runs of {data["max_steps"]} steps, seeds \
{seeds}. Commit {", ".join(sorted(commits))}, {data["date"]}, {data["machine"]["cores"]} cores of \
{data["machine"]["cpu"]}: {data["cpu_seconds"] / 60:.0f} core-minutes.
Missing, because the run failed: {"; ".join(data["missing"]) or "none"}.

Each cell: the mean over seeds, then the smallest to the largest. Training accuracy is the accuracy
reward, mean over all steps: how fast a run learns. Sampled, greedy and wrong video are accuracies
on held-out questions after training, the last one soft, with another question's clip shown; before
training, sampled soft accuracy is {min(before):.2f} to {max(before):.2f}. Tokens is the completion
length in the last tenth of training, weight the mean token weight. Differences are taken within a
seed, whose runs start from the same model and see the same questions in the same order.

<!-- figures: {os.path.relpath(out, PROJECT)}.json -->
{head}
|{" --- |" * len(table_rows(data)[0])}
{chr(10).join(rows)}

![Learning curves, mean over seeds]({out.name}.png)

A setting differs from alpha 1 only if its range excludes 0, and even then perhaps by chance: of
settings that change nothing, 1 in {2 ** (len(data["seeds"]) - 1)} shows the same sign in all seeds.
`{SETTINGS["null"]}` is such a control: its differences are rounding, grown over the steps. The toy
shows that the loop works, not that one setting beats another: answers have about 15 tokens, most
of them fixed by the format, and the paper's claim is about long reasoning.
"""


def draw(data: dict, path: str) -> None:
    """The learning curves, mean over seeds. Writes a PNG 900 pixels wide."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    for k, name in enumerate(data["table"]):
        mine = [run for run in data["runs"] if run["setting"] == name]
        curve = [fmean(values) for values in zip(*(run["curve"] for run in mine), strict=True)]
        steps = [mine[0]["curve_steps_per_point"] * (i + 0.5) for i in range(len(curve))]
        axes.plot(steps, curve, label=SETTINGS[name], linestyle=("-", "--", "-.", ":")[k % 4])
    axes.set(xlabel="step", ylabel="accuracy reward", title="Mean over seeds")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)


# --------------------------------------------------------------------------------------------- main


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not {text}")
    return int(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    add("--max_steps", type=positive, default=toy.DEFAULTS["max_steps"])
    add("--jobs", type=positive, default=2, help="runs at once, a thread each")
    add("--work_dir", type=Path, default=Path("runs/ablations"))
    add("--out", type=Path, default=PROJECT / "benchmarks/ablations", help="without extension")
    return parser.parse_args(arguments)


def commands_of(args: argparse.Namespace) -> tuple[dict, dict]:
    """{directory: command} of the toy worlds and of the runs. Raises SystemExit if one of them
    was made by another command."""
    work = args.work_dir.resolve()
    worlds = {
        work / f"seed{s}/world": world_command(work / f"seed{s}/world", s) for s in args.seeds
    }
    runs = {
        (out := work / f"seed{s}/{name}"): run_command(out, s, name, args.max_steps)
        for s in args.seeds
        for name in args.settings
    }
    for out, command in runs.items():
        made = (record(out) or dict(command=command))["command"]
        if made != command:
            changed = [pair for pair in pairwise(made) if pair not in set(pairwise(command))]
            other = " ".join(f"{a} {b}" for a, b in changed if a.startswith("--"))
            raise SystemExit(f"error: {out} was made with {other}; choose another --work_dir")
    return worlds, runs


def main() -> None:
    args, stop = parse(), Stop()
    stop.listen()
    worlds, runs = commands_of(args)
    whole = all([make_all(commands, args.jobs, stop) for commands in (worlds, runs)])
    if stop.asked:
        raise SystemExit("interrupted; the same command makes what is missing")
    done = [numbers_of(out) for out in runs if record(out)]
    if not done:
        raise SystemExit("error: no run was finished")
    data = dict(
        **provenance(),
        seeds=args.seeds,
        max_steps=args.max_steps,
        cpu_seconds=sum(record(out)["cpu_seconds"] for out in worlds | runs if record(out)),
        missing=[f"{out.name}, {out.parent.name}" for out in runs if not record(out)],
        **summary(done, args.settings),
        runs=done,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    Path(f"{args.out}.md").write_text(markdown(data, args.out), encoding="utf-8")
    draw(data, f"{args.out}.png")
    print(f"{args.out}.md, .json, .png")
    raise SystemExit(0 if whole else 1)


if __name__ == "__main__":
    main()
