"""twgrpo.py with one fault, for the tests: python faulty_run.py FAULT RANK STEP [flags].

FAULT is what happens to RANK at STEP: "nan" makes the loss NaN, "nan3" for three steps, "sigterm"
is a signal to that process alone, "disk_full" has every write of a checkpoint fail from there on,
"rollout" and "backward" raise in that phase, "update2" in the second update of the step.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import twgrpo  # noqa: E402
from model import ranks, rollout  # noqa: E402
from run import checkpoint  # noqa: E402

fault, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
now = 0
take, head = twgrpo.QuestionsAhead.take, twgrpo.tw_grpo_head
write_data = checkpoint.dcp.FileSystemWriter.write_data


def faulty_take(self, k):
    global now
    now = k
    if fault == "sigterm" and k == step and ranks.rank() == rank:
        os.kill(os.getpid(), signal.SIGTERM)
    return take(self, k)


def faulty_head(*args, **options):
    output = head(*args, **options)
    last = step + 2 if fault == "nan3" else step
    if fault.startswith("nan") and step <= now <= last and ranks.rank() == rank:
        output.loss = output.loss * float("nan")
    return output


def faulty_logits(hidden_RD, weight_VD):
    """ "logits": what the head gives is NaN; "weights": so is the head itself."""
    if fault in ("logits", "weights") and now == step and ranks.rank() == rank:
        hidden_RD = hidden_RD * float("nan")
        if fault == "weights":
            loaded["policy"].model.lm_head.weight.data.fill_(float("nan"))
    return head_logits(hidden_RD, weight_VD)


def remember(*args, **options):
    loaded["policy"] = load_policy(*args, **options)
    return loaded["policy"]


def raising(phase, function):
    calls = 0

    def faulty(*args):
        nonlocal calls
        calls += now == step
        first = 2 if fault.endswith("2") else 1
        if fault.startswith(phase) and now == step and ranks.rank() == rank and calls == first:
            raise ValueError(f"a fault in the {phase}")
        return function(*args)

    return faulty


def faulty_write(*args, **kwargs):
    if fault == "disk_full" and now >= step and ranks.rank() == rank:
        raise OSError(28, "No space left on device")
    return write_data(*args, **kwargs)


twgrpo.QuestionsAhead.take, twgrpo.tw_grpo_head = faulty_take, faulty_head
loaded, load_policy, twgrpo.load_policy = {}, twgrpo.load_policy, remember
head_logits, rollout.head_logits = rollout.head_logits, faulty_logits
twgrpo.rewards_of = raising("rollout", twgrpo.rewards_of)
twgrpo.differentiate = raising("backward", twgrpo.differentiate)
twgrpo.optimizer_step = raising("update", twgrpo.optimizer_step)
checkpoint.dcp.FileSystemWriter.write_data = faulty_write
ranks.run_script(twgrpo.main)
