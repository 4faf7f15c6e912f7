"""The processes of a run: one per GPU under torchrun, or one alone.

Without torchrun every function here is the obvious thing for a single process, so that the loop
reads the same. What waits for the others, from `gather` on, is called by all ranks or by none.
"""

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

PATIENCE = timedelta(hours=1)  # with a rank that decodes slow clips, before it counts as hung


def start() -> torch.device:
    """Joins the other ranks if torchrun started this process; returns this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    return torch.device(device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def gather(value) -> list:
    """The value of every rank, in order of rank; any small object that can be pickled."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def total(value: float) -> float:
    """The sum over ranks. A NaN anywhere makes it NaN everywhere."""
    return sum(gather(float(value)))


def agree(flag: bool) -> bool:
    """True on every rank if it is true on any."""
    return any(gather(bool(flag)))


def barrier() -> None:
    gather(None)


class StopSignal:
    """Ctrl-C or SIGTERM: finish the step, save and leave the loop. A second one acts at once."""

    def __enter__(self):
        self.requested = False
        self.before = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self.requested = True
        self.__exit__()
        name = signal.Signals(number).name
        tqdm.write(f"{name}: finishing the step, then saving; Ctrl-C to stop now", file=sys.stderr)
