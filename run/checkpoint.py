"""Saving checkpoints of a run, and resuming from one.

    run/checkpoint-N/                an ordinary Hugging Face checkpoint
    run/checkpoint-N/trainer_state/  float32 parameters, optimizer, counters; of the newest only

A checkpoint is written under another name and renamed when it is complete, so a kill at any moment
leaves the older one. The trainer state is a torch.distributed.checkpoint, which another number of
ranks can load. Loading unpickles its .metadata, which can run code: resume only from checkpoints
that you trust.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import optim
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

import files
from files import UserError
from model import ranks
from model.policy import Policy
from run.config import Config, check_changes, read_settings
from run.log import COUNTERS, RunLog

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


# ------------------------------------------------------------------------------------------- saving


class Saver:
    """Saves a run: when the loop asks for it, and before an error ends it.

    If a step raises before it has changed a weight, the steps before it are saved first. Saving
    takes all ranks, so several do that only if all of them know of the error (ranks.alone).
    """

    def __init__(
        self,
        cfg: Config,
        policy: Policy,
        optimizer: optim.Optimizer,
        log: RunLog,
        resume: tuple[Path, dict] | None,
    ):
        self.cfg, self.policy, self.optimizer, self.log = cfg, policy, optimizer, log
        self.saved = resume[0] if resume else None  # the newest checkpoint
        self.saved_step = resume[1]["step"] if resume else 0
        self.finished(self.saved_step)
        optimizer.register_step_pre_hook(self._weights_change)

    def _weights_change(self, *_) -> None:
        self.between_steps = False

    def finished(self, step: int) -> None:
        """The weights and counters are those after `step`, until the optimizer steps again."""
        self.step, self.counters, self.between_steps = step, dict(self.log.counts), True

    def save(self) -> None:
        """Writes the checkpoint of the step that is finished. Called by all ranks."""
        self.log.write(self.step)
        self.saved_step = self.step  # even if it fails: once is enough
        counters = {"step": self.step, **self.counters}
        model_only, source = self.cfg.save_only_model, self.cfg.model_name_or_path
        self.saved = save(self.policy, self.optimizer, counters, self.log.dir, source, model_only)

    @contextlib.contextmanager
    def rescuing(self) -> Iterator[None]:
        """The loop runs in here. Called by all ranks."""
        try:
            yield
        except Exception as error:
            agreed = ranks.world() == 1 or getattr(error, "agreed", False)
            unsaved = self.between_steps and self.step > self.saved_step
            kept = "nothing was saved"
            try:
                if agreed and unsaved and weights_are_finite(self.policy):
                    self.save()
            except UserError as another:  # the first error is the one to be raised
                kept = str(another)
            if self.saved:
                kept = f"{self.saved} holds the run so far"
            if ranks.is_main() or not agreed:
                tqdm.write(f"stopped after step {self.step}; {kept}", file=sys.stderr)
            raise


def weights_are_finite(policy: Policy) -> bool:
    """On all ranks. Saving NaNs would replace the last state that can be resumed."""
    shards = [getattr(p, "to_local", lambda p=p: p)() for p in policy.model.parameters()]
    return not ranks.agree(not all(shard.isfinite().all() for shard in shards))


def save(
    policy: Policy,
    optimizer: optim.Optimizer,
    counters: dict,
    run: Path,
    processor_from: str,
    model_only: bool = False,
) -> Path:
    """Writes run/checkpoint-STEP, where counters["step"] is the step. Called by all ranks. Raises
    UserError on all of them."""
    final = run / f"checkpoint-{counters['step']}"
    partial = run / f".{final.name}.partial"
    state = partial / "trainer_state"

    def begin() -> None:
        for killed in run.glob(".checkpoint-*.partial"):
            shutil.rmtree(killed)
        state.mkdir(parents=True)

    def write_state() -> None:
        dcp.save(_state(policy, optimizer), checkpoint_id=state, no_dist=ranks.world() == 1)

    def finish() -> None:
        if model_only:
            state.rmdir()
        else:
            (state / "counters.json").write_text(json.dumps(counters), encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            files.flush(path)  # fsync before the rename
        if final.exists():
            raise UserError("something has that name")
        os.rename(partial, final)
        for older in [] if model_only else checkpoints(run).values():
            if older != final and not (older / "trainer_state").is_symlink():
                shutil.rmtree(older / "trainer_state", ignore_errors=True)

    _together(final, begin, main_only=True)
    _together(final, policy.save, partial, processor_from)
    if not model_only:
        _together(final, write_state)
    _together(final, finish, main_only=True)
    return final


def _together(final: Path, action: Callable, *arguments, main_only: bool = False) -> None:
    """One stage of a save. If it fails on one rank, all of them raise UserError, so that none waits
    for the others in the next stage."""
    reason = None
    try:
        if ranks.is_main() or not main_only:
            action(*arguments)
    except (Exception, CheckpointException) as error:  # of safetensors, torch or the disk
        free = shutil.disk_usage(final.parent).free / 1e9
        reason = f"{_sentence(error)}; {free:.2f} GB free there"
    if failed := [r for r in ranks.gather(reason) if r is not None]:
        if ranks.is_main():
            shutil.rmtree(final.with_name(f".{final.name}.partial"), ignore_errors=True)
        raise UserError(
            f"{final} could not be written ({failed[0]}); earlier checkpoints are whole"
        )


def _sentence(error: BaseException) -> str:
    """The last line of an error's message, or its type."""
    if isinstance(error, CheckpointException):  # a BaseException, with one error per failed rank
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def _state(policy: Policy, optimizer: optim.Optimizer) -> dict:
    model, state = get_state_dict(policy.model, optimizer)
    return {"model": model, "optimizer": state}


# ----------------------------------------------------------------------------------------- resuming


def checkpoints(run: Path) -> dict[int, Path]:
    """{step: checkpoint-STEP} of a run; links and other names are not ours."""
    found = {}
    for path in run.iterdir() if run.is_dir() else ():
        name = re.fullmatch("checkpoint-(0|[1-9][0-9]{0,15})", path.name)
        if name and path.is_dir() and not path.is_symlink():
            found[int(name[1])] = path
    return found


def to_resume(cfg: Config, run: Path) -> tuple[Path, dict] | None:
    """The checkpoint to resume from, and its counters; None if the run has not saved yet. Prints
    what has changed since. Raises UserError; nothing is written."""
    path = find(run, cfg.resume_from_checkpoint) if cfg.resume_from_checkpoint else None
    if path is None:
        return None
    counters = read_counters(path)
    done = counters["step"]
    if later := [kept for step, kept in checkpoints(run).items() if step > done]:
        raise UserError(
            f"{later[0]} is later than {path}, and would be overwritten; resume from the newest "
            "checkpoint, or from this one into another --output_dir"
        )
    for line in check_changes(cfg, read_settings(path.parent), done):
        print(f"changed after step {done}: {line}")
    print(f"resuming from {path} after step {done}", flush=True)
    return path, counters


def find(run: Path, which: str) -> Path | None:
    """The checkpoint to resume from: `which` is a path, or "auto" for the newest of the run.

    None if "auto" finds no checkpoint, so that a new run can be started with "auto" too, and one
    that was killed before its first.
    """
    saved = checkpoints(run)
    if which == "auto" and not saved:
        print("no checkpoint: starting at step 1; lines of an older log move to NAME.after-0")
        return None
    path = saved[max(saved)] if which == "auto" else Path(which)
    if not (path / "trainer_state" / "counters.json").is_file():
        raise UserError(
            f"{path}: holds no trainer_state to resume from; only a run's newest checkpoint has "
            "one, and none with --save_only_model. To start a new run from its weights, give it "
            "as --model_name_or_path, with another --output_dir"
        )
    return path


def read_counters(path: Path) -> dict:
    """The counters of a checkpoint. Raises UserError if they are damaged."""
    file = path / "trainer_state" / "counters.json"
    remedy = "resume from another checkpoint, or start a new run from its weights"
    counters = files.read_json(file, remedy)
    if not all(type(counters.get(name)) is int for name in ("step", *COUNTERS)):
        raise UserError(f"{file} does not hold the counters of a run; {remedy}")
    return counters


def load(path: Path, policy: Policy, optimizer: optim.Optimizer) -> None:
    """Restores parameters and optimizer, in place. Called by all ranks. Raises UserError."""
    state = _state(policy, optimizer)
    try:
        dcp.load(state, checkpoint_id=path / "trainer_state", no_dist=ranks.world() == 1)
        set_state_dict(
            policy.model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    except (Exception, CheckpointException) as error:
        raise UserError(
            f"{path}: its trainer_state does not fit this model ({_sentence(error)})"
        ) from error
