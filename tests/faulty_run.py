"""twgrpo.py with one fault, for the tests: python faulty_run.py FAULT RANK STEP [flags].

FAULT is what happens to RANK at STEP: "nan" makes the loss NaN, "nan3" for three steps, "sigterm"
is a signal to that process alone, "disk_full" has every write of a checkpoint fail from there on,
"rollout" and "backward" raise in that phase.
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
now, take = 0, twgrpo.QuestionsAhead.take


def take_and_count(self, k):
    global now
    now = k
    return take(self, k)


def after(owner, name, act, steps=1):
    """Has act(result) follow owner.name on that rank, for that many steps."""
    function = getattr(owner, name)

    def faulty(*args, **options):
        result = function(*args, **options)
        if step <= now < step + steps and ranks.rank() == rank:
            act(result)
        return result

    setattr(owner, name, faulty)


def not_a_number(output):
    output.loss = output.loss * float("nan")


def fail(_):
    raise ValueError(f"a fault in the {fault}")


def disk_is_full(_):
    raise OSError(28, "No space left on device")


twgrpo.QuestionsAhead.take = take_and_count
FAULTS = dict(
    nan=(twgrpo, "tw_grpo_head", not_a_number),
    nan3=(twgrpo, "tw_grpo_head", not_a_number, 3),
    sigterm=(twgrpo, "rewards_of", lambda _: os.kill(os.getpid(), signal.SIGTERM)),
    rollout=(twgrpo, "rewards_of", fail),
    backward=(twgrpo, "differentiate", fail),
    disk_full=(checkpoint.dcp.FileSystemWriter, "write_data", disk_is_full, 99),
)
after(*FAULTS[fault])
ranks.run_script(twgrpo.main)
