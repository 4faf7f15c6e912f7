"""What the settings of the objective change on the embedded default: one table, one figure.

    python -m benchmarks.ablations
    python -m benchmarks.ablations --settings alpha_1 alpha_1.7 --seeds 0 1 2 3 --max_steps 200

Each run is an ordinary `python twgrpo.py` of one thread, `--jobs` at a time. A seed decides the toy
world (clips, questions, warm-started model), which is made once and shared by the runs of all
settings, the order of the questions, and the random numbers of sampling. So settings are compared
within a seed: the table shows differences to alpha 1 of the same seed, their mean and range.

Written are OUT.json (every number, and where it comes from), OUT.md and OUT.png. The runs stay in
the work directory; the same command after an interruption makes only those that are missing. A run
that fails is named, the others go on, the table says which is missing, and the exit code is 1.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import toy
import viz

PROJECT = Path(__file__).resolve().parent.parent
BASE = "alpha_1"  # token-normalised GRPO: all weights are 1
SETTINGS = {
    "grpo": dict(loss_type="grpo", alpha=1.0),
    "alpha_1": dict(loss_type="tw_grpo", alpha=1.0),
    "alpha_1.4": dict(loss_type="tw_grpo", alpha=1.4),
    "alpha_1.7": dict(loss_type="tw_grpo", alpha=1.7),
    "alpha_2": dict(loss_type="tw_grpo", alpha=2.0),
    "exclude": dict(loss_type="tw_grpo", alpha=1.7, ended_rows="exclude"),
    "textbook": dict(loss_type="tw_grpo", alpha=1.7, divergence="textbook"),
}
MEASURES = {  # name: (heading, decimals)
    "training_accuracy": ("accuracy reward, mean over training", 3),
    "sampled_soft": ("sampled, soft", 3),
    "sampled_exact": ("sampled, exact", 3),
    "greedy_soft": ("greedy, soft", 3),
    "greedy_exact": ("greedy, exact", 3),
    "wrong_video_soft": ("wrong video, soft", 3),
    "completion_length": ("tokens, last tenth of training", 1),
    "weight_mean": ("mean weight", 3),
}
PAIRED = ("training_accuracy", "sampled_soft")  # whose differences to alpha 1 are shown
COLOURS = ("#000000", *viz.COLOURS)
MAKE_WORLD = """import pathlib, sys, toy
part = pathlib.Path(sys.argv[1] + ".part")
toy.prepare(part, int(sys.argv[2]))
part.rename(sys.argv[1])"""  # renamed when whole, so that a kill leaves no half a world


# --------------------------------------------------------------------------------------------- runs


@dataclass
class Job:
    """One child process: a run, or the toy world that the runs of a seed share."""

    seed: int
    setting: str | None  # None: the world
    flags: dict  # of twgrpo.py, without paths
    directory: Path  # of the seed

    @property
    def out(self) -> Path:
        return self.directory / (self.setting or "world")

    @property
    def done(self) -> bool:
        if self.setting is None:
            return self.out.is_dir()
        measures = self.out / "eval.json"
        return measures.is_file() and "after" in json.loads(measures.read_text(encoding="utf-8"))

    @property
    def record(self) -> Path:
        """Where the job's commit and seconds are kept."""
        return self.directory / f"{self.setting or 'world'}.json"

    def __str__(self) -> str:
        return f"{self.setting or 'toy world'}, seed {self.seed}"

    def command(self) -> list[str]:
        if self.setting is None:
            return [sys.executable, "-c", MAKE_WORLD, str(self.out), str(self.seed)]
        world = self.directory / "world"
        paths = dict(model_name_or_path=world / "model", jsonl_path=world / "train.jsonl",
                     eval_jsonl_path=world / "test.jsonl", video_root=world,
                     output_dir=self.out)  # fmt: skip
        flags = [(f"--{name}", str(value)) for name, value in (self.flags | paths).items()]
        return [sys.executable, "twgrpo.py", *(part for pair in flags for part in pair)]

    def start(self) -> subprocess.Popen:
        """From nothing: what a killed attempt left is removed."""
        for left in (self.out, Path(f"{self.out}.part")):
            shutil.rmtree(left, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps(source()) + "\n", encoding="utf-8")
        quiet = {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10"}
        with open(f"{self.out}.log", "w", encoding="utf-8") as log:
            # In a session of its own, Ctrl-C reaches it only through us.
            return subprocess.Popen(self.command(), cwd=PROJECT, env=os.environ | quiet, stdout=log,
                                    stderr=log, start_new_session=True)  # fmt: skip

    def ended(self, code: int, cpu_seconds: float) -> str | None:
        """Notes what it cost, in seconds; what its log says last, if it failed."""
        row = json.loads(self.record.read_text(encoding="utf-8")) | {"cpu_seconds": cpu_seconds}
        self.record.write_text(json.dumps(row) + "\n", encoding="utf-8")
        if code == 0 and self.done:
            return None
        lines = Path(f"{self.out}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        tail = [line for line in lines if line.strip()][-5:]
        return "\n".join([f"exit code {code}, log {self.out}.log", *tail])


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Worlds first, then seed by seed."""
    work = args.work_dir.resolve()
    shared = toy.DEFAULTS | dict(
        max_steps=args.max_steps, save_steps=args.max_steps, save_only_model=True
    )
    worlds = [Job(seed, None, {}, work / f"seed{seed}") for seed in args.seeds]
    return worlds + [
        Job(world.seed, name, shared | SETTINGS[name] | dict(seed=world.seed), world.directory)
        for world in worlds
        for name in args.settings
    ]


def check_same_flags(job: Job) -> None:
    """Raises SystemExit if a finished run was made with other flags than now asked for."""
    made = json.loads((job.out / "config.json").read_text(encoding="utf-8"))
    other = [f"--{name} {made.get(name)}" for name, v in job.flags.items() if made.get(name) != v]
    if other:
        raise SystemExit(
            f"error: {job.out} was made with {' '.join(other)}; choose another --work_dir"
        )


def execute(jobs: list[Job], at_once: int) -> Iterator[tuple[Job, str | None]]:
    """Each job as it ends, and why it failed or None. Whoever stops early kills what still runs."""
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            ready = [j for j in waiting if j.setting is None or (j.directory / "world").is_dir()]
            for job in ready[: at_once - len(running)]:
                waiting.remove(job)
                process = job.start()
                running[process.pid] = job, process
            if not running:
                yield from ((job, "its toy world could not be made") for job in waiting)
                return
            pid, status, usage = os.wait4(-1, 0)  # this one also tells what the child cost
            job, process = running.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            yield job, job.ended(process.returncode, usage.ru_utime + usage.ru_stime)
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()


# ------------------------------------------------------------------------------------------ numbers


def git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True,
                              check=True).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""


def source() -> dict:
    """The commit of the code, and whether tracked files differ from it; null if there is no git."""
    commit = git("rev-parse", "--short", "HEAD") or None
    dirty = bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None
    return dict(commit=commit, dirty=dirty)


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def spread(values: list[float]) -> dict | None:
    if not values:
        return None
    return dict(mean=mean(values), min=min(values), max=max(values), seeds=len(values))


def measures_of(run: Path) -> dict[str, float]:
    """A finished run's row: shares in [0, 1], tokens, weights."""
    rows = viz.read_metrics(run)
    after = json.loads((run / "eval.json").read_text(encoding="utf-8"))["after"]
    last = rows[-max(1, len(rows) // 10) :]
    return dict(
        training_accuracy=mean([row["rewards/accuracy"] for row in rows]),
        sampled_soft=after["sampled"]["soft"],
        sampled_exact=after["sampled"]["exact"],
        greedy_soft=after["greedy"]["soft"],
        greedy_exact=after["greedy"]["exact"],
        wrong_video_soft=after["wrong video"]["soft"],
        completion_length=mean([row["completion_length"] for row in last]),
        weight_mean=mean([row["weight_mean"] for row in rows]),
    )


def curve_of(run: Path) -> list[list[float]]:
    """At most 20 points [step, mean accuracy reward of the steps around it]."""
    rows = viz.read_metrics(run)
    size = max(1, len(rows) // 20)
    blocks = [rows[k : k + size] for k in range(0, len(rows) - size + 1, size)]
    return [[mean([r[n] for r in block]) for n in ("step", "rewards/accuracy")] for block in blocks]


def collect(jobs: list[Job], args: argparse.Namespace) -> dict:
    """All numbers of the finished runs, and what the table shows of them."""
    runs = {(job.setting, job.seed): job for job in jobs if job.setting}
    values = {key: measures_of(job.out) for key, job in runs.items() if job.done}
    table, differences = {}, {}
    for name in args.settings:
        seeds = [s for s in args.seeds if (name, s) in values]
        paired = [s for s in seeds if (BASE, s) in values]
        table[name] = {m: spread([values[name, s][m] for s in seeds]) for m in MEASURES}
        differences[name] = {
            m: spread([values[name, s][m] - values[BASE, s][m] for s in paired]) for m in MEASURES
        }
    records = [(j, json.loads(j.record.read_text())) for j in jobs if j.done and j.record.is_file()]
    costs = {(job.setting, job.seed): record for job, record in records}
    names = ("torch", "transformers", "numpy")
    return dict(
        **source(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        versions=dict(python=platform.python_version()) | {n: metadata.version(n) for n in names},
        machine=dict(cpu=cpu_name(), cores=os.cpu_count()),
        flags=dict(seeds=args.seeds, max_steps=args.max_steps, settings=args.settings,
                   jobs=args.jobs),
        cpu_seconds=sum(record.get("cpu_seconds", 0) for _, record in records),
        missing=[str(job) for key, job in runs.items() if key not in values],
        table=table,
        differences_to_alpha_1=differences,
        worlds=[dict(seed=job.seed) | record for job, record in records if not job.setting],
        runs=[
            dict(setting=name, seed=seed, flags=runs[name, seed].flags, measures=measures,
                 eval=json.loads((runs[name, seed].out / "eval.json").read_text()),
                 curve=curve_of(runs[name, seed].out))
            | costs.get((name, seed), {})
            for (name, seed), measures in values.items()
        ],
    )  # fmt: skip


# --------------------------------------------------------------------------------- table and figure


def label(name: str) -> str:
    flags = SETTINGS[name]
    if flags["loss_type"] == "grpo":
        return "grpo"
    extra = [f"{k} {v}" for k, v in flags.items() if k not in ("loss_type", "alpha")]
    return ", ".join([f"alpha {flags['alpha']:g}", *extra])


def cell(value: dict | None, decimals: int, sign: str = "") -> str:
    if value is None:
        return "none"
    numbers = [f"{value[k]:{sign}.{decimals}f}" for k in ("mean", "min", "max")]
    return f"{numbers[0]}<br>{numbers[1]} to {numbers[2]}"


def rows_of(data: dict) -> list[list[str]]:
    """The table, its head first; differences stand right of what they are differences of."""
    head, rows = ["setting"], []
    for measure, (heading, _) in MEASURES.items():
        head += [heading] + ["difference to alpha 1"] * (measure in PAIRED)
    for name, values in data["table"].items():
        row = [label(name)]
        for measure, (_, decimals) in MEASURES.items():
            row.append(cell(values[measure], decimals))
            if measure in PAIRED:
                difference = data["differences_to_alpha_1"][name][measure]
                row.append("0" if name == BASE else cell(difference, decimals, "+"))
        rows.append(row)
    return [head, *rows]


def one_sided(data: dict, measure: str) -> list[str]:
    """The settings whose difference to alpha 1 has the same sign for all seeds."""
    found = {n: d[measure] for n, d in data["differences_to_alpha_1"].items() if n != BASE}
    return [label(n) for n, d in found.items() if d and (d["min"] > 0 or d["max"] < 0)]


def sentences(data: dict) -> list[str]:
    """What the numbers do and do not show, in words that the numbers decide."""
    runs, seeds = data["runs"], len(data["flags"]["seeds"])
    before = [run["eval"]["before"]["sampled"]["soft"] for run in runs]
    after = [run["measures"]["sampled_soft"] for run in runs]
    wrong = [run["measures"]["wrong_video_soft"] for run in runs]
    lines = [
        f"The loop works with every setting: sampled soft accuracy goes from {min(before):.2f} to "
        f"{max(before):.2f} before training to {min(after):.2f} to {max(after):.2f} after it; with "
        f"another question's clip it is {min(wrong):.2f} to {max(wrong):.2f}."
    ]
    others = [n for n, d in data["differences_to_alpha_1"].items() if n != BASE and d[PAIRED[0]]]
    for measure in PAIRED if others else ():
        base = data["table"][BASE][measure]
        lines.append(
            f"{MEASURES[measure][0].capitalize()}: alpha 1 alone differs by "
            f"{base['max'] - base['min']:.3f} between its seeds. The difference to alpha 1 has "
            f"one sign for all seeds with: {'; '.join(one_sided(data, measure)) or 'no setting'}. "
            "For every other setting it is within the spread over seeds."
        )
    if others:
        lines.append(
            f"What one sign is worth: if a setting changed nothing, {seeds} seeds would agree in "
            f"sign in 1 of {2 ** (seeds - 1)} cases, so about {len(others) / 2 ** (seeds - 1):.1f} "
            f"of the {len(others)} settings in each column of differences would by chance alone."
        )
    lines.append(
        "A toy shows that the loop works, not that one setting beats another: half a million "
        "parameters, answers of about 15 tokens of which few matter, and weights close to 1. It "
        "says nothing about long reasoning, where the paper's claim lies."
    )
    return lines


def markdown(data: dict, out: Path) -> str:
    head, *rows = ["| " + " | ".join(row) + " |" for row in rows_of(data)]
    commits = {f"{r['commit']}{' with changes' * r['dirty']}" for r in data["runs"] if r.get("commit")}
    missing = f"\nMissing, because the run failed: {'; '.join(data['missing'])}.\n"
    seeds = ", ".join(map(str, data["flags"]["seeds"]))
    return f"""# Ablation on the toy

`python -m benchmarks.ablations`: {len(data["runs"])} runs of {data["flags"]["max_steps"]} steps, \
seeds {seeds}. Commit {", ".join(sorted(commits)) or "unknown"}, {data["date"]}, {data["machine"]["cores"]} cores of \
{data["machine"]["cpu"]}, {data["cpu_seconds"] / 60:.0f} core-minutes.

Each cell: mean over seeds, then smallest to largest. Accuracies after training are of held-out
questions; "wrong video" is the control in which each is shown another question's clip. Runs of one
seed start from the same model and are asked the same questions in the same order, so differences
are taken within a seed.
{missing if data["missing"] else ""}
<!-- figures: benchmarks/ablations.json -->
{head}
|{" --- |" * len(MEASURES)}{" --- |" * (1 + len(PAIRED))}
{chr(10).join(rows)}

![Learning curves, and differences to alpha 1]({out.name}.png)

""" + "\n".join(f"- {line}" for line in sentences(data)) + "\n"


def draw(data: dict, path: str) -> None:
    """Learning curves, and every seed's differences to alpha 1. Writes a PNG 900 pixels wide."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(9, 8.5), dpi=100, layout="constrained")
    axes = figure.subplot_mosaic([["curves", "curves"], list(PAIRED)], height_ratios=(1.15, 1))
    colours = dict(zip(SETTINGS, COLOURS, strict=True))
    values = {(run["setting"], run["seed"]): run for run in data["runs"]}
    for k, name in enumerate(data["table"]):
        curves = [run["curve"] for (setting, _), run in values.items() if setting == name]
        points = [[mean(list(column)) for column in zip(*p, strict=True)]
                  for p in zip(*curves, strict=True)]  # fmt: skip
        if points:
            axes["curves"].plot(*zip(*points, strict=True), ("-", "--", "-.", ":")[k % 4],
                                color=colours[name], linewidth=1.8, label=label(name))  # fmt: skip
    axes["curves"].set(xlabel="step", ylabel="accuracy reward",
                       title="while training, mean over seeds")  # fmt: skip
    axes["curves"].legend(fontsize=10)
    axes["curves"].grid(alpha=0.3)
    names = [name for name in data["table"] if name != BASE]
    for measure in PAIRED:
        axis = axes[measure]
        for y, name in enumerate(names):
            pairs = [(values[name, s]["measures"][measure], values[BASE, s]["measures"][measure])
                     for s in data["flags"]["seeds"]
                     if (name, s) in values and (BASE, s) in values]  # fmt: skip
            differences = [a - b for a, b in pairs]
            axis.plot(differences, [y] * len(pairs), "o", color=colours[name], alpha=0.6)
            if pairs:
                axis.plot(mean(differences), y, "|", color=colours[name], ms=22, mew=2.5)
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_yticks(range(len(names)), [label(n).replace(", ", ",\n") for n in names])
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel("difference to alpha 1 of the same seed")
        axis.set_title(MEASURES[measure][0].replace(", mean", ",\nmean"), fontsize=11)
        axis.grid(alpha=0.3)
    axes[PAIRED[1]].set_title("sampled soft accuracy\nafter training", fontsize=11)
    axes[PAIRED[1]].tick_params(labelleft=False)
    figure.savefig(path)


# --------------------------------------------------------------------------------------------- main


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--max_steps", type=positive, default=toy.DEFAULTS["max_steps"])
    parser.add_argument("--jobs", type=positive, default=2, help="runs at once, a thread each")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--out", type=Path, default=PROJECT / "benchmarks" / "ablations",
                        help="what is written, without .json, .md and .png")  # fmt: skip
    args = parser.parse_args(arguments)
    args.seeds, args.settings = list(dict.fromkeys(args.seeds)), list(dict.fromkeys(args.settings))
    return args


def main() -> None:
    args, start = parse(), time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs, failed = jobs_of(args), 0
    before = [job for job in jobs if job.setting and job.done]
    for job in before:
        check_same_flags(job)
    todo = [job for job in jobs if not job.done]
    if before:
        print(f"{len(before)} runs were finished before: {args.work_dir}", flush=True)
    try:
        with contextlib.closing(execute(todo, args.jobs)) as ends:
            for k, (job, error) in enumerate(ends, 1):
                minutes = (time.monotonic() - start) / 60
                print(f"[{k}/{len(todo)}, {minutes:.1f} min] {job}: {error or 'done'}", flush=True)
                failed += error is not None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command makes what is missing") from None
    data = collect(jobs, args)
    data |= dict(wall_seconds=time.monotonic() - start, runs_finished_before=len(before))
    if not data["runs"]:
        raise SystemExit("error: no run was finished")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    Path(f"{args.out}.md").write_text(markdown(data, args.out), encoding="utf-8")
    draw(data, f"{args.out}.png")
    print(f"{args.out}.md, .json, .png")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
