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
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import toy
from benchmarks.origin import source, surroundings
from tools import curves

PROJECT = Path(__file__).resolve().parent.parent
BASE = "alpha_1"  # token-normalised GRPO: all weights are 1
SETTINGS = {
    "grpo": dict(loss_type="grpo", alpha=1.0),
    "alpha_1": dict(loss_type="tw_grpo", alpha=1.0),
    "null": dict(loss_type="tw_grpo", alpha=1.0001),  # no change to speak of: what chance does
    "alpha_1.4": dict(loss_type="tw_grpo", alpha=1.4),
    "alpha_1.7": dict(loss_type="tw_grpo", alpha=1.7),
    "alpha_2": dict(loss_type="tw_grpo", alpha=2.0),
    "exclude": dict(loss_type="tw_grpo", alpha=1.7, ended_rows="exclude"),
    "textbook": dict(loss_type="tw_grpo", alpha=1.7, divergence="textbook"),
}
MEASURES = {  # heading in the table, decimals
    "training_accuracy": ("training accuracy", 3),
    "sampled_soft": ("sampled soft", 3),
    "sampled_exact": ("sampled exact", 3),
    "greedy_soft": ("greedy soft", 3),
    "greedy_exact": ("greedy exact", 3),
    "wrong_video_soft": ("wrong video", 3),
    "completion_length": ("tokens", 1),
    "weight_mean": ("weight", 3),
}
PAIRED = {  # whose differences to alpha 1 are shown: what they are, in the figure and in sentences
    "training_accuracy": "accuracy reward, mean over training",
    "sampled_soft": "sampled soft accuracy after training",
}
COLOURS = (  # Okabe-Ito, and grey for the control
    "#000000", "#0072B2", "#999999", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7",
)  # fmt: skip
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
        try:
            return "after" in json.loads((self.out / "eval.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):  # not begun; killed while writing
            return False

    @property
    def record(self) -> Path:
        """Where the job's commit and seconds are kept."""
        return self.directory / f"{self.setting or 'world'}.json"

    def cost(self) -> dict:
        """Its commit, and CPU seconds if they could be noted; nothing if somebody else made it."""
        try:
            return json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):  # not there; killed while writing
            return {}

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
        row = json.dumps(self.cost() | {"cpu_seconds": cpu_seconds})
        self.record.write_text(row + "\n", encoding="utf-8")
        if code == 0 and self.done:
            return None
        lines = Path(f"{self.out}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        tail = [line for line in lines if line.strip()][-5:]
        return "\n".join([f"exit code {code}, log {self.out}.log", *tail])


def shared_flags(args: argparse.Namespace) -> dict:
    """The toy's own, without checkpoints on the way."""
    steps = dict(max_steps=args.max_steps, save_steps=args.max_steps, save_only_model=True)
    return toy.DEFAULTS | steps


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Worlds first, then seed by seed."""
    work, shared = args.work_dir.resolve(), shared_flags(args)
    worlds = [Job(seed, None, {}, work / f"seed{seed}") for seed in args.seeds]
    return worlds + [
        Job(world.seed, name, shared | SETTINGS[name] | dict(seed=world.seed), world.directory)
        for world in worlds
        for name in args.settings
    ]


def check_same_flags(job: Job) -> None:
    """Raises SystemExit if the run is finished, and was made with other flags than asked for."""
    if job.setting is None or not job.done:
        return
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
            if pid not in running:  # somebody else's child, handed to us when its parent ended
                continue
            job, process = running.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            yield job, job.ended(process.returncode, usage.ru_utime + usage.ru_stime)
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()


# ------------------------------------------------------------------------------------------ numbers


def spread(values: list[float]) -> dict | None:
    if not values:
        return None
    return dict(mean=fmean(values), min=min(values), max=max(values), seeds=len(values))


def numbers_of(job: Job) -> dict:
    """A finished run: shares in [0, 1], tokens, weights, CPU seconds."""
    rows = curves.read_metrics(job.out)
    measures = json.loads((job.out / "eval.json").read_text(encoding="utf-8"))
    after = measures["after"]
    size, tenth = max(1, len(rows) // 20), max(1, len(rows) // 10)
    accuracy = [row["rewards/accuracy"] for row in rows]
    return dict(
        setting=job.setting,
        seed=job.seed,
        flags=SETTINGS[job.setting],
        **job.cost(),
        measures=dict(
            training_accuracy=fmean(accuracy),
            sampled_soft=after["sampled"]["soft"],
            sampled_exact=after["sampled"]["exact"],
            greedy_soft=after["greedy"]["soft"],
            greedy_exact=after["greedy"]["exact"],
            wrong_video_soft=after["wrong video"]["soft"],
            completion_length=fmean(row["completion_length"] for row in rows[-tenth:]),
            weight_mean=fmean(row["weight_mean"] for row in rows),
        ),
        eval=measures,
        curve=[fmean(accuracy[k : k + size]) for k in range(0, len(rows), size)],
        curve_steps_per_point=size,
    )


def collect(jobs: list[Job], args: argparse.Namespace) -> dict:
    """All numbers of the finished runs, and what the table shows of them."""
    runs = [numbers_of(job) for job in jobs if job.setting and job.done]
    values = {(run["setting"], run["seed"]): run["measures"] for run in runs}
    table, differences = {}, {}
    for name in args.settings:
        mine = {seed: v for (setting, seed), v in values.items() if setting == name}
        base = {seed: values[BASE, seed] for seed in mine if (BASE, seed) in values}
        table[name] = {m: spread([v[m] for v in mine.values()]) for m in MEASURES}
        differences[name] = {m: spread([mine[s][m] - base[s][m] for s in base]) for m in MEASURES}
    return dict(
        **source(),
        **surroundings(),
        flags={name: getattr(args, name) for name in ("seeds", "settings", "max_steps", "jobs")},
        flags_of_all_runs=shared_flags(args),
        cpu_seconds=sum(job.cost().get("cpu_seconds", 0) for job in jobs if job.done),
        missing=[str(job) for job in jobs if job.setting and not job.done],
        table=table,
        differences_to_alpha_1=differences,
        worlds=[{"seed": job.seed} | job.cost() for job in jobs if not job.setting],
        runs=runs,
    )


# --------------------------------------------------------------------------------- table and figure


def label(name: str) -> str:
    """A setting in words: its flags."""
    flags = dict(SETTINGS[name])
    if flags.pop("loss_type") == "grpo":
        return "grpo"
    words = [f"alpha {flags.pop('alpha'):g}", *(f"{k} {v}" for k, v in flags.items())]
    return ", ".join(words)


def cell(value: dict | None, decimals: int, sign: str = "") -> str:
    if value is None:
        return "none"
    mean, low, high = (f"{value[k]:{sign}.{decimals}f}" for k in ("mean", "min", "max"))
    return f"{mean}<br>{low} to {high}"


def table_rows(data: dict) -> list[list[str]]:
    """The table, its head first; a difference stands right of what it is a difference of."""
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


def learned(runs: list[dict]) -> str:
    """Did every run learn, and to look at the clip?"""
    before = [run["eval"]["before"]["sampled"]["soft"] for run in runs]
    after = [run["measures"]["sampled_soft"] for run in runs]
    wrong = [run["measures"]["wrong_video_soft"] for run in runs]
    ranges = [f"{min(values):.2f} to {max(values):.2f}" for values in (before, after, wrong)]
    each = [f"{r['setting']}, seed {r['seed']}" for r in runs]
    failed = [n for n, b, a, w in zip(each, before, after, wrong, strict=True) if a <= max(b, w)]
    verdict = (
        "So the loop works with each of these settings, and what is learned is to look at the clip."
        if not failed
        else f"Not better than both: {'; '.join(failed)}."
    )
    return (
        f"Over all runs, sampled soft accuracy is {ranges[0]} before training and {ranges[1]} "
        f"after it; with another question's clip it ends at {ranges[2]}. {verdict}"
    )


def sentences(data: dict) -> list[str]:
    """What the numbers show and what not, in words that the numbers decide."""
    lines, seeds = [learned(data["runs"])], len(data["flags"]["seeds"])
    compared = {n: d for n, d in data["differences_to_alpha_1"].items() if n != BASE}
    complete = {n for n, d in compared.items() if (d["sampled_soft"] or {}).get("seeds") == seeds}
    compared = {n: d for n, d in compared.items() if seeds > 1 and n in complete}
    for measure, words in PAIRED.items() if compared else ():
        base = data["table"][BASE][measure]
        same = [n for n, d in compared.items() if d[measure]["min"] * d[measure]["max"] > 0]
        lines.append(
            f"{words.capitalize()}: alpha 1 itself differs by {base['max'] - base['min']:.3f} "
            "between seeds. The difference to alpha 1 has one sign for all seeds with: "
            f"{'; '.join(map(label, same)) or 'no setting'}. For every other setting that has "
            "all its seeds, the range over seeds holds 0."
        )
    if compared:
        chance = 2 ** (seeds - 1)
        lines.append(
            f"What one sign is worth: where a setting changes nothing, {seeds} seeds agree in sign "
            f"in 1 of {chance} cases; of {len(compared)} such settings about "
            f"{len(compared) / chance:.1f} would in each column."
        )
    if "null" in compared:
        low, high = (compared["null"]["sampled_soft"][end] for end in ("min", "max"))
        lines.append(
            f"{label('null')} is the control: such weights change nothing to speak of, so what its "
            f"runs differ by, {low:+.3f} to {high:+.3f} in sampled soft accuracy, is chance, grown "
            "over the steps from a rounding error."
        )
    return lines + [
        "A toy is a toy: it says that the loop works, not that one setting beats another. Answers "
        "have about 15 tokens, most of them fixed by the form; the paper's claim is about long "
        "reasoning, of which there is none here."
    ]


def markdown(data: dict, out: Path) -> str:
    head, *rows = ["| " + " | ".join(row) + " |" for row in table_rows(data)]
    made = {f"{r.get('commit')}{' with changes' * bool(r.get('dirty'))}" for r in data["runs"]}
    parts = [
        "# Ablation on the toy",
        f"`python -m benchmarks.ablations`: {len(data['runs'])} runs of "
        f"{data['flags']['max_steps']} steps, seeds {', '.join(map(str, data['flags']['seeds']))}. "
        f"Commit {', '.join(sorted(made))}, {data['date']}, {data['machine']['cores']} cores of "
        f"{data['machine']['cpu']}: {data['cpu_seconds'] / 60:.0f} core-minutes, "
        f"{data['wall_seconds'] / 60:.0f} minutes.",
        "Each cell: the mean over seeds, then the smallest to the largest. Training accuracy is "
        "the accuracy reward, mean over all steps: the area under the learning curve, so the speed "
        "of learning. Sampled, greedy and wrong video are accuracies on held-out questions after "
        "training, the last one soft, with another question's clip shown. Tokens is the length of "
        "completions in the last tenth of training, weight the mean token weight over training. "
        "Runs of one seed start from the same model and are asked the same questions in the same "
        "order, so differences are taken within a seed.",
        f"Missing, because the run failed: {'; '.join(data['missing'])}." * bool(data["missing"]),
        f"<!-- figures: {os.path.relpath(out, PROJECT)}.json -->\n"
        + "\n".join([head, "|" + " --- |" * len(table_rows(data)[0]), *rows]),
        f"![Learning curves, and differences to alpha 1]({out.name}.png)",
        "\n".join(f"- {line}" for line in sentences(data)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(data: dict, path: str) -> None:
    """Learning curves, and every seed's differences to alpha 1. Writes a PNG 900 pixels wide."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(9, 8.5), dpi=100, layout="constrained")
    axes = figure.subplot_mosaic([["curves"] * 2, list(PAIRED)], height_ratios=(1.2, 1))
    colours = dict(zip(SETTINGS, COLOURS, strict=True))
    runs = {(run["setting"], run["seed"]): run for run in data["runs"]}
    for i, name in enumerate(data["table"]):
        mine = [run for (setting, _), run in runs.items() if setting == name]
        if mine:
            curve = [fmean(values) for values in zip(*(r["curve"] for r in mine), strict=True)]
            style = dict(color=colours[name], linestyle=("-", "--", "-.", ":")[i % 4])
            size = mine[0]["curve_steps_per_point"]
            steps = [size * (k + 0.5) for k in range(len(curve))]
            axes["curves"].plot(steps, curve, label=label(name), **style)
    axes["curves"].set(xlabel="step", ylabel="accuracy reward", title="Mean over seeds")
    axes["curves"].legend(fontsize=10)
    others = [name for name in data["table"] if name != BASE]
    for measure, title in PAIRED.items():
        for y, name in enumerate(others):
            seeds = [s for s in data["flags"]["seeds"] if {(name, s), (BASE, s)} <= set(runs)]
            for s in seeds:
                a, b = (runs[n, s]["measures"][measure] for n in (name, BASE))
                axes[measure].plot(a - b, y, "o", color=colours[name], alpha=0.6)
            if seeds:  # the bar: their mean
                middle = data["differences_to_alpha_1"][name][measure]["mean"]
                axes[measure].plot(middle, y, "|", color=colours[name], ms=22, mew=2.5)
        axes[measure].axvline(0, color="grey", linewidth=1)
        axes[measure].set_yticks(
            range(len(others)), [label(n).replace(", ", ",\n") for n in others]
        )
        axes[measure].set_ylim(len(others) - 0.5, -0.5)
        axes[measure].set_xlabel("difference to alpha 1; dots: seeds, bar: mean")
        axes[measure].set_title(title[0].upper() + title[1:], fontsize=11)
    axes["sampled_soft"].tick_params(labelleft=False)
    for axis in axes.values():
        axis.grid(alpha=0.3)
    figure.savefig(path)


# --------------------------------------------------------------------------------------------- main


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not {text}")
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


def work_through(jobs: list[Job], args: argparse.Namespace) -> int:
    """Makes what is missing, a line for each job that ends; the number that failed."""
    todo, failed, start = [job for job in jobs if not job.done], 0, time.monotonic()
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs and toy worlds are there", flush=True)
    with contextlib.closing(execute(todo, args.jobs)) as ends:
        for k, (job, error) in enumerate(ends, 1):
            minutes = (time.monotonic() - start) / 60
            print(f"[{k}/{len(todo)}, {minutes:.1f} min] {job}: {error or 'done'}", flush=True)
            failed += error is not None
    return failed


def main() -> None:
    args, start = parse(), time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup's choice stays
            signal.signal(number, signal.default_int_handler)
    jobs = jobs_of(args)
    for job in jobs:
        check_same_flags(job)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    clock = args.work_dir / "wall_seconds"  # of all commands that made these runs
    earlier = 0.0
    with contextlib.suppress(OSError, ValueError):  # the first command; killed while writing
        earlier = float(clock.read_text())
    try:
        failed = work_through(jobs, args)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command makes what is missing") from None
    finally:
        clock.write_text(str(earlier + time.monotonic() - start))
    data = collect(jobs, args)
    data["wall_seconds"] = float(clock.read_text())
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
