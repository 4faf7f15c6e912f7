"""Saving checkpoints of a run, and resuming from one.

    run/checkpoint-N/                an ordinary Hugging Face checkpoint
    run/checkpoint-N/trainer_state/  float32 parameters, optimizer, counters; newest only

A checkpoint is written under a temporary name and renamed when complete, so a kill at any moment
leaves the older one intact. The trainer state is a torch.distributed.checkpoint, which can be
loaded with a different number of ranks. Loading unpickles its .metadata, which can run code: resume
only from checkpoints that you trust.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import optim
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

import files
from files import UserError, brief
from model import ranks
from model.policy import Policy
from run.config import BATCH, Config, check_changes
from run.log import COUNTERS, RunLog

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


# ------------------------------------------------------------------------------------------- saving


class Saver:
    """Saves a run when the loop asks for it, and before an error ends it.

    If a step raises before it has changed any weights, the steps before it are saved first. Saving
    involves all ranks, so with several this happens only if all know of the error (ranks.alone).
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
        # The newest checkpoint, if any, and the finished step.
        self.saved, self.step = (resume[0], resume[1]["step"]) if resume else (None, 0)
        self.unsaved = False
        optimizer.register_step_pre_hook(self._weights_change)
        for killed in log.dir.glob(".checkpoint-*.partial") if ranks.is_main() else ():
            shutil.rmtree(killed, ignore_errors=True)

    def _weights_change(self, *_) -> None:
        self.unsaved = False

    def finished(self, step: int) -> None:
        """Notes that weights and counters are those after `step`, until the next optimizer step."""
        self.step, self.counters, self.unsaved = step, dict(self.log.counts), True

    def save(self) -> None:
        """Writes the checkpoint of the finished step. All ranks must call it, and if it fails on
        one, all raise UserError."""
        self.unsaved = False  # even if it fails, to try only once
        final = self.log.dir / f"checkpoint-{self.step}"
        partial, reason = final.with_name(f".{final.name}.partial"), None
        try:
            self._write(partial, final)
        except (Exception, CheckpointException) as error:  # from safetensors, torch or the disk
            free = shutil.disk_usage(final.parent).free / 1e9
            reason = f"{_sentence(error)}; {free:.2f} GB free there"
        if failed := [r for r in ranks.gather(reason) if r is not None]:
            if ranks.is_main():
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"{final} could not be written ({failed[0]}); earlier checkpoints are intact"
            )
        self.saved = final

    def _write(self, partial: Path, final: Path) -> None:
        """If one rank cannot write, no other waits for it: dcp.save raises on all, and after the
        last collective, which is in Policy.save, only the first rank has work left."""
        if not self.cfg.save_only_model:
            path, alone = partial / "trainer_state", ranks.world() == 1
            dcp.save(_state(self.policy, self.optimizer), checkpoint_id=path, no_dist=alone)
        self.policy.save(partial, self.cfg.model_name_or_path)
        if not ranks.is_main():
            return
        if not self.cfg.save_only_model:
            counters = json.dumps({"step": self.step, **self.counters})
            (path / "counters.json").write_text(counters, encoding="utf-8")
        for written in [*partial.rglob("*"), partial]:
            files.flush(written)  # fsync before the rename
        os.rename(partial, final)  # fails if the name is taken, unless by an empty directory
        for older in [] if self.cfg.save_only_model else checkpoints(final.parent).values():
            if older != final:
                shutil.rmtree(older / "trainer_state", ignore_errors=True)

    @contextlib.contextmanager
    def rescuing(self) -> Iterator[None]:
        """Wraps the training loop. All ranks must enter it."""
        try:
            yield
        except Exception as error:
            agreed = ranks.world() == 1 or getattr(error, "agreed", False)
            kept = "nothing was saved"
            try:
                if agreed and self.unsaved and weights_are_finite(self.policy):
                    self.save()
            except UserError as another:  # raise the first error, not this one
                kept = str(another)
            if self.saved:
                kept = f"{self.saved} holds the run so far"
            if ranks.is_main() or not agreed:
                tqdm.write(f"stopped after step {self.step}; {kept}", file=sys.stderr)
            raise


def weights_are_finite(policy: Policy) -> bool:
    """Checks all ranks. Saving NaNs would overwrite the last state that can be resumed."""
    shards = [getattr(p, "to_local", lambda p=p: p)() for p in policy.model.parameters()]
    return not ranks.agree(not all(shard.isfinite().all() for shard in shards))


def _sentence(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # a BaseException, with one error per failed rank
        error = next(iter(error.failures.values()))[0]
    return brief(error)


def _state(policy: Policy, optimizer: optim.Optimizer) -> dict:
    model, state = get_state_dict(policy.model, optimizer)
    return {"model": model, "optimizer": state}


# ----------------------------------------------------------------------------------------- resuming


def checkpoints(run: Path) -> dict[int, Path]:
    """{step: checkpoint-STEP} of a run; ignores symlinks and other names."""
    found = {}
    for path in run.iterdir() if run.is_dir() else ():
        name = re.fullmatch("checkpoint-(0|[1-9][0-9]{0,15})", path.name)
        if name and path.is_dir() and not path.is_symlink():
            found[int(name[1])] = path
    return found


def to_resume(cfg: Config, run: Path) -> tuple[Path, dict] | None:
    """The checkpoint to resume from, and its step, counters and history of settings; None if the
    run has not saved yet. Prints what has changed since. Raises UserError. Writes nothing."""
    path = find(run, cfg.resume_from_checkpoint) if cfg.resume_from_checkpoint else None
    if path is None:
        return None
    remedy = "resume from another checkpoint, or start a new run from its weights"
    file = path / "trainer_state" / "counters.json"
    counters = files.read_json(file, remedy, numbers=("step", *COUNTERS))
    done = counters["step"]
    if later := [kept for step, kept in checkpoints(run).items() if step > done]:
        raise UserError(
            f"{later[0]} is later than {path}, and would be overwritten; resume from the newest "
            "checkpoint, or from this one into another --output_dir"
        )
    remedy = "choose another --output_dir"
    old = files.read_json(path.parent / "config.json", remedy, ("world_size", *BATCH))
    history = old.get("history", [])
    if changed := check_changes(cfg, old, done):
        history.append({"until_step": done, **changed})
    print(f"resuming from {path} after step {done}", flush=True)
    return path, counters | {"history": history}


def find(run: Path, which: str) -> Path | None:
    """The checkpoint to resume from: `which` is a path, or "auto" for the run's newest.

    None if "auto" finds no checkpoint, so that "auto" also works for a new run, or for one that
    was killed before its first checkpoint.
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


def load(path: Path, policy: Policy, optimizer: optim.Optimizer) -> None:
    """Restores parameters and optimizer in place. All ranks must call it. Raises UserError."""
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
