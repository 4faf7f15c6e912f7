"""twgrpo.py with one fault, for the tests: python faulty_run.py FAULT RANK STEP [flags].

FAULT is what happens to RANK at STEP: "nan" makes the loss NaN, "nan3" for three steps, "sigterm"
is a signal to that process alone, "disk_full" has every write of a checkpoint fail from there on.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint  # noqa: E402
import ranks  # noqa: E402
import twgrpo  # noqa: E402

fault, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
now = 0
take, question_loss = twgrpo.QuestionsAhead.take, twgrpo.question_loss
write_data = checkpoint.dcp.FileSystemWriter.write_data


def faulty_take(self, k):
    global now
    now = k
    if fault == "sigterm" and k == step and ranks.rank() == rank:
        os.kill(os.getpid(), signal.SIGTERM)
    return take(self, k)


def faulty_loss(*args):
    output = question_loss(*args)
    last = step + 2 if fault == "nan3" else step
    if fault.startswith("nan") and step <= now <= last and ranks.rank() == rank:
        output.loss = output.loss * float("nan")
    return output


def faulty_write(*args, **kwargs):
    if fault == "disk_full" and now >= step and ranks.rank() == rank:
        raise OSError(28, "No space left on device")
    return write_data(*args, **kwargs)


twgrpo.QuestionsAhead.take, twgrpo.question_loss = faulty_take, faulty_loss
checkpoint.dcp.FileSystemWriter.write_data = faulty_write
twgrpo.main()
