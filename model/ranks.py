"""The processes of a run: one per GPU under torchrun, or just one.

Without torchrun, every function here does the obvious thing for a single process, so the loop reads
the same. `gather`, and everything below that uses it, must be called by all ranks or by none.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from files import UserError

PATIENCE = timedelta(hours=1)  # a rank may decode slow clips for this long before it counts as hung


def start() -> torch.device:
    """Joins the other ranks if torchrun started this process; returns this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        names = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if not os.environ.get(name)]:
            raise UserError(
                f"RANK is set in the environment, but not {', '.join(missing)}; start several "
                "ranks with torchrun, or unset RANK for one process"
            )
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    return torch.device(device)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; under torchrun, then exits the process with the right exit code.

    It skips interpreter shutdown, when meshes, FSDP and DTensors still refer to process groups:
    gloo's threads outlive the interpreter, and C++ aborts a run that had already finished
    (pytorch #190489, #179291).
    """
    if "RANK" not in os.environ:
        return main()
    code = 1
    try:
        main()
        if dist.is_initialized():
            gather(None)  # no rank leaves while another still has something to send
            dist.destroy_process_group()
        code = 0
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        else:
            code = ending.code or 0
    except BaseException:  # as the interpreter would
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # its reader may be gone
                stream.flush()
        os._exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


class Failed(UserError):
    """Another rank failed at a point where all ranks can still agree on what to do."""

    agreed = True


def gather(value: object) -> list:
    """All ranks' values, in rank order; any small picklable object.

    Raises Failed if another rank raised inside `alone`.
    """
    if not dist.is_initialized():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    for k, other in enumerate(values):
        if isinstance(other, Failed) and k != rank():
            raise other
    return values


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """For work without collectives other than `gather`. If it raises on one rank, that rank still
    joins the others' next `gather`, and all of them raise."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, Failed):
            with contextlib.suppress(Failed):  # several ranks may fail at once
                gather(Failed(f"rank {rank()} failed: {str(error) or type(error).__name__}"))
        error.agreed = True
        raise


def on_first(action: Callable, *arguments: object) -> object:
    """Runs action(*arguments) on the first rank only; every rank returns its result or raises its
    UserError or OSError."""
    answer = None
    if is_main():
        try:
            answer = action(*arguments)
        except (UserError, OSError) as error:
            answer = error
    answer = gather(answer)[0]
    if isinstance(answer, Exception):
        raise answer
    return answer


def total(value: float) -> float:
    """The sum over ranks. A NaN anywhere makes it NaN everywhere."""
    return sum(gather(float(value)))


def agree(flag: bool) -> bool:
    """True on every rank if it is true on any."""
    return any(gather(bool(flag)))


class StopSignal:
    """On Ctrl-C, SIGTERM or SIGHUP, asks the loop to finish its step, save and stop. A second
    signal acts at once."""

    def __enter__(self):
        self.requested = False
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)  # under nohup, closing the terminal must not stop the run
        self.before = {n: signal.signal(n, self._receive) for n in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        self.requested = True
        self.__exit__()
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # the terminal may be gone
            tqdm.write(f"{name}: finishing the step, then saving; Ctrl-C to stop now", sys.stderr)
