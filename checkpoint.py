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
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import optim
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import ranks
from policy import Policy


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
    problem = None
    try:
        if ranks.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "trainer_state").mkdir(parents=True)
    except OSError as error:
        problem = error
    _agree_on(problem, partial)
    try:
        policy.save(partial, processor_from)
        if not model_only:
            dcp.save(
                _state(policy, optimizer),
                checkpoint_id=partial / "trainer_state",
                no_dist=ranks.world() == 1,
            )
            if ranks.is_main():
                text = json.dumps({"step": step, **counters})
                (partial / "trainer_state" / "counters.json").write_text(text, encoding="utf-8")
    except Exception as error:  # safetensors and dcp wrap an OSError in types of their own
        problem = error
    _agree_on(problem, partial)
    try:
        if ranks.is_main():
            if model_only:
                shutil.rmtree(partial / "trainer_state")
            _flush(partial)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for older in run.glob("checkpoint-*/trainer_state"):
                if older.parent != final and not model_only:
                    shutil.rmtree(older)
    except OSError as error:
        problem = error
    _agree_on(problem, partial)
    return final


def _agree_on(problem: Exception | None, partial: Path) -> None:
    reasons = [reason for reason in ranks.gather(problem and str(problem)) if reason]
    if reasons:
        if ranks.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        name = partial.name.strip(".").removesuffix(".partial")
        first = reasons[0].strip().splitlines()[-1][:300]
        raise CheckpointError(
            f"{partial.parent / name} could not be written ({first}); earlier checkpoints are whole"
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
        found = [p.parent for p in run.glob("checkpoint-*/trainer_state/counters.json")]
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
