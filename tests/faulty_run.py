"""twgrpo.py with a fault of FAULTS, on one rank: python faulty_run.py FAULT RANK STEP [flags]."""

import os
import signal
import sys

import twgrpo
from model import ranks
from run import checkpoint

fault, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]


def becomes_nan(output):
    output.loss = output.loss * float("nan")


def is_signalled(_):
    os.kill(os.getpid(), signal.SIGTERM)


def fails(_):
    raise ValueError(f"a fault in {fault}")


FAULTS = {  # the function, what happens to its result, and for how many steps
    "nan": (twgrpo, "tw_grpo_head", becomes_nan, 1),
    "nan3": (twgrpo, "tw_grpo_head", becomes_nan, 3),
    "sigterm": (twgrpo, "rewards_of", is_signalled, 1),
    "rollout": (twgrpo, "rewards_of", fails, 1),
    "backward": (twgrpo, "differentiate", fails, 1),
    "checkpoint": (checkpoint.dcp.FileSystemWriter, "write_data", fails, 99),
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
