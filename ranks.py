"""The processes of a run: one per GPU under torchrun, or one alone.

Without torchrun every function here is the obvious thing for a single process, so that the loop
reads the same. Nothing here is called by one rank only: each call is met by all of them.
"""

import os

import torch
import torch.distributed as dist


def start() -> torch.device:
    """Joins the other ranks if torchrun started this process; returns this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
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
