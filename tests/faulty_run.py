"""twgrpo.py with one fault, for the tests: python faulty_run.py FAULT RANK STEP [flags].

FAULT, one of FAULTS, is what happens to RANK at STEP.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import twgrpo  # noqa: E402
from model import ranks  # noqa: E402
from run import checkpoint  # noqa: E402

fault, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]


def becomes_nan(output):
    output.loss = output.loss * float("nan")


def is_signalled(_):
    os.kill(os.getpid(), signal.SIGTERM)


def fails(_):
    raise ValueError(f"a fault in {fault}")


def finds_a_full_disk(_):
    raise OSError(28, "No space left on device")


FAULTS = {  # the function, what happens to its result, and for how many steps
    "nan": (twgrpo, "tw_grpo_head", becomes_nan, 1),
    "nan3": (twgrpo, "tw_grpo_head", becomes_nan, 3),
    "sigterm": (twgrpo, "rewards_of", is_signalled, 1),
    "rollout": (twgrpo, "rewards_of", fails, 1),
    "backward": (twgrpo, "differentiate", fails, 1),
    "disk_full": (checkpoint.dcp.FileSystemWriter, "write_data", finds_a_full_disk, 99),
}
owner, name, act, steps = FAULTS[fault]
function, rate, now = getattr(owner, name), twgrpo.rate, 0


def rate_and_note(cfg, k):
    global now
    now = k
    return rate(cfg, k)


def faulty(*args, **options):
    result = function(*args, **options)
    if step <= now < step + steps and ranks.rank() == rank:
        act(result)
    return result


twgrpo.rate = rate_and_note
setattr(owner, name, faulty)
ranks.run_script(twgrpo.main)
