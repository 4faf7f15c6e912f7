"""Checkpoints of a run, and going on from one.

    run/checkpoint-N/                an ordinary Hugging Face checkpoint
    run/checkpoint-N/trainer_state/  float32 parameters, optimizer, counters; of the newest only

A checkpoint is written beside its place and renamed when it is whole, so a kill at any moment
leaves the older one. The trainer state is a torch.distributed.checkpoint: another number of ranks
can load it.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import optim
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import ranks
from policy import Policy

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read. The message names it and the remedy."""


def save(
    policy: Policy,
    optimizer: optim.Optimizer,
    counters: dict,
    run: Path,
    step: int,
    processor_from: str,
    model_only: bool = False,
) -> Path:
    """Writes run/checkpoint-STEP. Called by all ranks. Raises CheckpointError on all of them."""
    final, partial = run / f"checkpoint-{step}", run / f".checkpoint-{step}.partial"

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "trainer_state").mkdir(parents=True)

    def finish() -> None:
        if model_only:
            shutil.rmtree(partial / "trainer_state")
        else:
            text = json.dumps({"step": step, **counters})
            (partial / "trainer_state" / "counters.json").write_text(text, encoding="utf-8")
        _flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for older in [] if model_only else run.glob("checkpoint-*/trainer_state"):
            if older.parent != final:
                shutil.rmtree(older)

    _together(partial, begin, main_only=True)
    _together(partial, policy.save, partial, processor_from)
    if not model_only:
        _together(
            partial,
            dcp.save,
            _state(policy, optimizer),
            checkpoint_id=partial / "trainer_state",
            no_dist=ranks.world() == 1,
        )
    _together(partial, finish, main_only=True)
    return final


def _together(partial: Path, action, *arguments, main_only: bool = False, **options) -> None:
    """One stage of a save. If it fails on any rank it fails on all, and no rank waits alone."""
    reason = None
    try:
        if ranks.is_main() or not main_only:
            action(*arguments, **options)
    except (Exception, CheckpointException) as error:  # of safetensors, torch and the disk
        if isinstance(error, CheckpointException):  # no Exception; one error of each failed rank
            error = next(iter(error.failures.values()))[0]
        free = shutil.disk_usage(partial.parent).free / 1e9
        reason = f"{str(error).strip().splitlines()[-1][:200]}; {free:.2f} GB free there"
    reasons = [r for r in ranks.gather(reason) if r is not None]
    if reasons:
        if ranks.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        name = partial.with_name(partial.name.strip(".").removesuffix(".partial"))
        raise CheckpointError(
            f"{name} could not be written ({reasons[0]}); earlier checkpoints are whole"
        )


def _flush(directory: Path) -> None:
    """Has the disk hold every file before the rename says that it does."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _state(policy: Policy, optimizer: optim.Optimizer) -> dict:
    model, state = get_state_dict(policy.model, optimizer)
    return {"model": model, "optimizer": state}


def find(run: Path, which: str) -> Path | None:
    """The checkpoint to go on from: `which` is a path, or "auto" for the newest of the run.

    None if "auto" finds none, which is how a run that is always started with "auto" begins.
    """
    if which == "auto":
        found = [p.parents[1] for p in run.glob("checkpoint-*/trainer_state/counters.json")]
        return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
    if not (Path(which) / "trainer_state" / "counters.json").is_file():
        raise CheckpointError(
            f"{which}: holds no trainer_state to go on from; only a run's newest checkpoint does"
        )
    return Path(which)


def load(path: Path, policy: Policy, optimizer: optim.Optimizer) -> dict:
    """Puts parameters and optimizer as they were, in place; returns the counters, "step" first."""
    state = _state(policy, optimizer)
    try:
        dcp.load(state, checkpoint_id=path / "trainer_state", no_dist=ranks.world() == 1)
    except Exception as error:
        raise CheckpointError(
            f"{path}: its trainer_state does not fit this model ({error})"
        ) from error
    set_state_dict(
        policy.model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return json.loads((path / "trainer_state" / "counters.json").read_text(encoding="utf-8"))


def move_aside_later_rows(run: Path, step: int) -> None:
    """Log lines written after `step` go to NAME.after-STEP, and a line cut off by a kill with them.

    The lines that stay are then those of the run that was never interrupted.
    """
    for name in ("metrics.jsonl", "completions.jsonl"):
        path = run / name
        if not path.exists():
            continue
        kept, later = [], []
        for line in path.read_bytes().splitlines(keepends=True):
            found = re.match(rb'\{"step": (\d+),', line)
            whole = found and line.endswith(b"\n")
            (kept if whole and int(found[1]) <= step else later).append(line)
        if later:
            with open(run / f"{name}.after-{step}", "ab") as aside:
                aside.writelines(later)
            beside = run / f".{name}.partial"
            beside.write_bytes(b"".join(kept))
            os.replace(beside, path)
