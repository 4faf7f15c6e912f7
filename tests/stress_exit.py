"""Many two-rank runs, to see how their processes end: python tests/stress_exit.py RUNS [--plain]

A rank of a run that finished must end with exit code 0, not by a signal. Most of a short run's time
goes into imports, so this process imports everything once and forks the ranks, which run the `main`
of twgrpo.py on a tiny world and then end as the script does. --plain ends them through the
interpreter's own shutdown instead, which is what could abort (pytorch #190489, #179291).
"""

import argparse
import collections
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import torch.distributed as dist  # noqa: E402

import twgrpo  # noqa: E402
from model import ranks  # noqa: E402

LIMIT = 900  # seconds a run may take before its ranks count as hung
FLAGS = (
    "--max_frames 4 --min_pixels 3136 --max_pixels 3136 --max_completion_length 4 --num_generations"
    " 2 --dataloader_num_workers 0 --gradient_checkpointing false --max_steps 1 --report_to none"
).split()


def start_store() -> tuple[int, int]:
    """(pid, port) of a process that keeps the ranks' store, as torchrun's own process does."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, f"{store.port}\n".encode())
        signal.pause()
    os.close(writing)
    with os.fdopen(reading) as answer:
        return pid, int(answer.readline())


def become_rank(rank: int, port: int, world: Path, out: Path) -> None:
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    errors = os.open(out.with_suffix(f".{rank}.err"), os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    paths = ["--model_name_or_path", world / "model", "--jsonl_path", world / "train.jsonl"]
    paths += ["--video_root", world, "--output_dir", out]
    sys.argv = ["twgrpo.py", *map(str, paths), *FLAGS]


def ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("runs", type=int)
parser.add_argument("--plain", action="store_true")
parser.add_argument("--at_once", type=int, default=3, help="runs side by side: the load")
args = parser.parse_args()

place = Path(tempfile.mkdtemp(prefix="stress-"))
make = "import sys, toy, pathlib; toy.prepare(pathlib.Path(sys.argv[1]), 0, 20, 1, 2)"
subprocess.run([sys.executable, "-c", make, place / "world"], check=True, cwd=PROJECT)
endings, alive, stores, started, is_rank = collections.Counter(), {}, {}, 0, False
begun = time.time()
while not is_rank and (started < args.runs or alive):
    if started < args.runs and len(stores) < args.at_once:
        started += 1
        stores[started], port = start_store()
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                is_rank = True
                become_rank(rank, port, place / "world", place / f"r{started}")
                break
            alive[pid] = started, rank, time.time()
        continue
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid in alive:
        run, rank, _ = alive.pop(pid)
        endings[ending(status)] += 1
        if status:
            print(f"run {run}, rank {rank}: {ending(status)}", flush=True)
            print((place / f"r{run}.{rank}.err").read_text()[-1000:], flush=True)
        if run not in [other for other, _, _ in alive.values()]:
            os.kill(stores.pop(run), signal.SIGKILL)
    elif not pid:
        time.sleep(0.02)
        for hung, (_, _, since) in alive.items():
            if time.time() - since > LIMIT:
                os.kill(hung, signal.SIGKILL)
if is_rank and args.plain:
    twgrpo.main()
    if dist.is_initialized():
        dist.destroy_process_group()
elif is_rank:
    ranks.run_script(twgrpo.main)
else:
    counts = ", ".join(f"{count} ranks ended with {end}" for end, count in endings.items())
    print(f"{args.runs} two-rank runs in {time.time() - begun:.0f} s: {counts}")
    print(f"what they wrote is in {place}")
