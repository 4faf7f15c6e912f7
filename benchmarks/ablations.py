"""What the settings of the objective change on the embedded default: one table, one figure.

    python -m benchmarks.ablations
    python -m benchmarks.ablations --settings alpha_1 alpha_1.7 --seeds 0 1 2 3 --max_steps 200

Each run is an ordinary `python twgrpo.py` on one thread, `--jobs` of them at a time. A seed fixes
the toy world (clips, questions, warm-started model), which is made once and shared, the order of
the questions, and the random numbers of sampling. So settings are compared within a seed.

Writes OUT.json (every number and where it comes from), OUT.md and OUT.png. The same command after
an interruption makes only the runs that are missing. A run that fails is named, the others go on,
and the exit code is 1.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean

import toy
from benchmarks.origin import provenance, source
from files import replacing
from tools import curves

PROJECT = Path(__file__).resolve().parent.parent
BASE = "alpha_1"  # token-normalised GRPO: all weights are 1
SETTINGS = {
    "grpo": dict(loss_type="grpo", alpha=1.0),
    "alpha_1": dict(loss_type="tw_grpo", alpha=1.0),
    "null": dict(loss_type="tw_grpo", alpha=1.0001),  # the control: differs by chance alone
    "alpha_1.4": dict(loss_type="tw_grpo", alpha=1.4),
    "alpha_1.7": dict(loss_type="tw_grpo", alpha=1.7),
    "alpha_2": dict(loss_type="tw_grpo", alpha=2.0),
    "exclude": dict(loss_type="tw_grpo", alpha=1.7, ended_rows="exclude"),
    "textbook": dict(loss_type="tw_grpo", alpha=1.7, divergence="textbook"),
}
MEASURES = {  # heading in the table, decimals
    "training_accuracy": ("training accuracy", 3),
    "sampled_soft": ("sampled soft", 3),
    "greedy_soft": ("greedy soft", 3),
    "wrong_video_soft": ("wrong video", 3),
    "completion_length": ("tokens", 1),
    "weight_mean": ("weight", 3),
}
PAIRED = {  # whose differences to alpha 1 are shown
    "training_accuracy": "Accuracy reward, mean over training",
    "sampled_soft": "Sampled soft accuracy after training",
}
MAKE_WORLD = "import pathlib, sys, toy; toy.prepare(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"


# --------------------------------------------------------------------------------------------- runs


class Runs:
    """The runs of all settings and seeds in a work directory, started from a pool of threads."""

    def __init__(self, args: argparse.Namespace):
        self.work, self.max_steps = args.work_dir.resolve(), args.max_steps
        self.all = [(setting, seed) for seed in args.seeds for setting in args.settings]
        self.world_of = {seed: threading.Lock() for seed in args.seeds}
        self.children: set[subprocess.Popen] = set()
        self.stopped = threading.Event()

    def directory(self, setting: str, seed: int) -> Path:
        return self.work / f"seed{seed}" / setting

    def record(self, setting: str, seed: int) -> dict | None:
        """Commit and CPU seconds of a run, which are written when it is finished; else None."""
        path = Path(f"{self.directory(setting, seed)}.json")
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def flags(self, setting: str, seed: int) -> dict:
        steps = dict(max_steps=self.max_steps, save_steps=self.max_steps, save_only_model=True)
        return toy.DEFAULTS | steps | SETTINGS[setting] | dict(seed=seed)

    def check_same_flags(self) -> None:
        """Raises SystemExit if a finished run was made with other flags than asked for."""
        for run in self.all:
            if not self.record(*run):
                continue
            made = json.loads((self.directory(*run) / "config.json").read_text(encoding="utf-8"))
            wanted = self.flags(*run)
            other = [f"--{k} {made.get(k)}" for k in wanted if made.get(k) != wanted[k]]
            if other:
                raise SystemExit(
                    f"error: {self.directory(*run)} was made with {' '.join(other)}; choose "
                    "another --work_dir"
                )

    def make(self, setting: str, seed: int) -> None:
        """One run, and before it its world if there is none. Raises RuntimeError if one fails."""
        out, world = self.directory(setting, seed), self.work / f"seed{seed}" / "world"
        world.parent.mkdir(parents=True, exist_ok=True)
        with self.world_of[seed]:
            if not world.exists():
                self.execute(["-c", MAKE_WORLD, str(world), str(seed)], world.with_suffix(".log"))
        paths = dict(model_name_or_path=world / "model", jsonl_path=world / "train.jsonl",
                     eval_jsonl_path=world / "test.jsonl", video_root=world,
                     output_dir=out)  # fmt: skip
        flags = [f"--{name}={value}" for name, value in (self.flags(setting, seed) | paths).items()]
        shutil.rmtree(out, ignore_errors=True)  # of a run that was killed
        code = source()
        seconds = self.execute(["twgrpo.py", *flags], Path(f"{out}.log"))
        with replacing(Path(f"{out}.json")) as partial:
            partial.write_text(json.dumps(code | dict(cpu_seconds=seconds)), encoding="utf-8")

    def execute(self, arguments: list[str], log: Path) -> float:
        """Runs Python on one thread and returns its CPU seconds."""
        if self.stopped.is_set():
            raise RuntimeError("interrupted")
        quiet = {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10"}
        with open(log, "w", encoding="utf-8") as file:
            # In a session of its own, Ctrl-C reaches the child only through `stop`.
            child = subprocess.Popen(
                [sys.executable, *arguments], cwd=PROJECT, env=os.environ | quiet, stdout=file,
                stderr=file, start_new_session=True,
            )  # fmt: skip
        self.children.add(child)
        if self.stopped.is_set():  # since the look above
            child.kill()
        _, status, usage = os.wait4(child.pid, 0)  # tells what it cost, unlike Popen.wait
        self.children.discard(child)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
            raise RuntimeError("\n".join([f"exit code {child.returncode}, log {log}", *tail]))
        return usage.ru_utime + usage.ru_stime

    def stop(self) -> None:
        self.stopped.set()
        for child in list(self.children):
            child.kill()

    def make_missing(self, jobs: int) -> list[str]:
        """Makes every run that is missing. Returns the names of those that failed."""
        todo, failed = [run for run in self.all if not self.record(*run)], []
        print(f"{len(self.all) - len(todo)} of {len(self.all)} runs are there", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                futures = {pool.submit(self.make, *run): "{}, seed {}".format(*run) for run in todo}
                for k, future in enumerate(as_completed(futures), 1):
                    error = future.exception()
                    print(f"[{k}/{len(todo)}] {futures[future]}: {error or 'done'}", flush=True)
                    failed += [futures[future]] if error else []
            except KeyboardInterrupt:
                ignore_signals()  # a second Ctrl-C must not leave children behind
                self.stop()
                pool.shutdown(cancel_futures=True)
                raise
        return failed


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ignore_signals() -> None:
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------ numbers


def numbers_of(runs: Runs, setting: str, seed: int) -> dict:
    """A finished run: shares in [0, 1], tokens, weights, CPU seconds."""
    out = runs.directory(setting, seed)
    rows = curves.read_metrics(out)
    measures = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    after, accuracy = measures["after"], [row["rewards/accuracy"] for row in rows]
    size, tenth = max(1, len(rows) // 20), max(1, len(rows) // 10)
    return dict(
        setting=setting,
        seed=seed,
        flags=SETTINGS[setting],
        **runs.record(setting, seed),
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


def values_of(data: dict, setting: str, measure: str, minus: str | None = None) -> list[float]:
    """A measure of a setting for every seed, or its difference to the setting `minus`."""
    of = {(run["setting"], run["seed"]): run["measures"][measure] for run in data["runs"]}
    seeds = [seed for name, seed in of if name == setting and (minus or name, seed) in of]
    return [of[setting, seed] - (of[minus, seed] if minus else 0) for seed in seeds]


# --------------------------------------------------------------------------------- table and figure


def label(name: str) -> str:
    """A setting in words: its flags."""
    flags = dict(SETTINGS[name])
    if flags.pop("loss_type") == "grpo":
        return "grpo"
    return ", ".join([f"alpha {flags.pop('alpha'):g}", *(f"{k} {v}" for k, v in flags.items())])


def cell(values: list[float], decimals: int, sign: str = "") -> str:
    if not values:
        return "none"
    mean, low, high = (f"{x:{sign}.{decimals}f}" for x in (fmean(values), min(values), max(values)))
    return f"{mean}<br>{low} to {high}"


def table_rows(data: dict) -> list[list[str]]:
    """The table, its head first; a difference stands right of what it is a difference of."""
    head, rows = ["setting"], [[label(name)] for name in data["flags"]["settings"]]
    for measure, (heading, decimals) in MEASURES.items():
        head += [heading] + ["difference to alpha 1"] * (measure in PAIRED)
        for name, row in zip(data["flags"]["settings"], rows, strict=True):
            row.append(cell(values_of(data, name, measure), decimals))
            if measure in PAIRED:
                differences = values_of(data, name, measure, minus=BASE)
                row.append("0" if name == BASE else cell(differences, decimals, "+"))
    return [head, *rows]


def sentences(data: dict) -> list[str]:
    """What the numbers show, in words that the numbers decide."""
    before = [run["eval"]["before"]["sampled"]["soft"] for run in data["runs"]]
    after = [run["measures"]["sampled_soft"] for run in data["runs"]]
    wrong = [run["measures"]["wrong_video_soft"] for run in data["runs"]]
    ranges = [f"{min(v):.2f} to {max(v):.2f}" for v in (before, after, wrong)]
    learned = [a > max(b, w) for a, b, w in zip(after, before, wrong, strict=True)]
    lines = [
        f"Sampled soft accuracy is {ranges[0]} before training and {ranges[1]} after it; with "
        f"another question's clip it ends at {ranges[2]}. {sum(learned)} of {len(learned)} runs "
        "end above both."
    ]
    seeds = len(data["flags"]["seeds"])
    for measure, words in PAIRED.items() if seeds > 1 else ():
        differences = {n: values_of(data, n, measure, BASE) for n in data["flags"]["settings"]}
        same = [label(n) for n, d in differences.items() if len(d) == seeds and min(d) * max(d) > 0]
        base = values_of(data, BASE, measure)
        lines.append(
            f"{words}: alpha 1 itself varies by {max(base) - min(base):.3f} between seeds. The "
            f"difference to alpha 1 has the same sign for every seed with: "
            f"{'; '.join(same) or 'no setting'}."
        )
    return lines + [
        f"A setting that changes nothing has the same sign for {seeds} seeds in 1 of "
        f"{2 ** (seeds - 1)} cases. {label('null')} is such a setting: its differences are chance.",
        "This shows that the loop works, not that one setting beats another. Answers have about 15 "
        "tokens, most of them fixed by the format; the paper's claim is about long reasoning.",
    ]


def markdown(data: dict, out: Path) -> str:
    head, *rows = ["| " + " | ".join(row) + " |" for row in table_rows(data)]
    made = {f"{r.get('commit')}{' with changes' * bool(r.get('dirty'))}" for r in data["runs"]}
    seeds = ", ".join(map(str, data["flags"]["seeds"]))
    missing = f"Missing, because the run failed: {'; '.join(data['missing'])}."
    parts = [
        "# Ablation on the toy",
        f"`python -m benchmarks.ablations`: {len(data['runs'])} runs of "
        f"{data['flags']['max_steps']} steps, seeds {seeds}. Commit {', '.join(sorted(made))}, "
        f"{data['date']}, {data['machine']['cores']} cores of {data['machine']['cpu']}.",
        "Each cell: mean over seeds, then minimum to maximum. Training accuracy is the accuracy "
        "reward averaged over all steps. Sampled, greedy and wrong video are soft accuracies on "
        "held-out questions after training, the last with another question's clip. Tokens is the "
        "completion length in the last tenth of training, weight the mean token weight. Runs of "
        "one seed share the starting model and the order of questions.",
        missing * bool(data["missing"]),
        "<!-- computed: tests/test_ablations.py::"
        "test_the_committed_table_is_that_of_the_committed_numbers -->\n"
        + "\n".join([head, "|" + " --- |" * len(table_rows(data)[0]), *rows]),
        f"![Learning curves, and differences to alpha 1]({out.name}.png)",
        "\n".join(f"- {line}" for line in sentences(data)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(data: dict, path: str) -> None:
    """Learning curves, and every seed's differences to alpha 1, as a PNG."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(9, 8.5), dpi=100, layout="constrained")
    axes = figure.subplot_mosaic([["curves"] * 2, list(PAIRED)], height_ratios=(1.2, 1))
    names = data["flags"]["settings"]
    for name in names:
        runs = [run for run in data["runs"] if run["setting"] == name]
        if runs:
            curve = [fmean(points) for points in zip(*(run["curve"] for run in runs), strict=True)]
            steps = [runs[0]["curve_steps_per_point"] * (k + 0.5) for k in range(len(curve))]
            axes["curves"].plot(steps, curve, label=label(name))
    axes["curves"].set(xlabel="step", ylabel="accuracy reward", title="Mean over seeds")
    axes["curves"].legend(fontsize=10)
    others = [name for name in names if name != BASE]
    for measure, title in PAIRED.items():
        axis = axes[measure]
        for y, name in enumerate(others):
            differences = values_of(data, name, measure, minus=BASE)
            axis.plot(differences, [y] * len(differences), "ko", alpha=0.6)
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_yticks(range(len(others)), [label(n).replace(", ", ",\n") for n in others])
        axis.invert_yaxis()
        axis.set_xlabel("difference to alpha 1, one dot a seed")
        axis.set_title(title, fontsize=11)
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
    parser.add_argument("--jobs", type=positive, default=2, help="runs at a time, a thread each")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--out", type=Path, default=PROJECT / "benchmarks" / "ablations",
                        help="where to write, without .json, .md and .png")  # fmt: skip
    args = parser.parse_args(arguments)
    args.seeds, args.settings = list(dict.fromkeys(args.seeds)), list(dict.fromkeys(args.settings))
    return args


def main() -> None:
    args = parse()
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's choice stays
            signal.signal(number, signal.default_int_handler)
    runs = Runs(args)
    runs.check_same_flags()
    try:
        failed = runs.make_missing(args.jobs)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command makes what is missing") from None
    finished = [numbers_of(runs, *run) for run in runs.all if runs.record(*run)]
    if not finished:
        raise SystemExit("error: no run was finished")
    flags = {name: getattr(args, name) for name in ("seeds", "settings", "max_steps", "jobs")}
    data = dict(**provenance(), flags=flags, missing=failed, runs=finished)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    Path(f"{args.out}.md").write_text(markdown(data, args.out), encoding="utf-8")
    draw(data, f"{args.out}.png")
    print(f"{args.out}.md, .json, .png")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
