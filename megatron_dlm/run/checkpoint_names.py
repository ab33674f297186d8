"""Names of checkpoints, as users write them: RUN, RUN@STEP, or the directory itself."""

from __future__ import annotations

from pathlib import Path

from megatron_dlm.checkpointing.layout import CHECKPOINTS, MANIFEST, CheckpointRoot, step_of
from megatron_dlm.interfaces import InputError
from megatron_dlm.run.run_record import EXPORT_CONFIG

NAMED_STEPS = 12
"""Most steps that an error names."""


def find_checkpoint(name: Path, step: int | None = None) -> Path:
    """The directory that a checkpoint's name means.

    Args:
        name: a run's directory, which means its newest complete checkpoint; RUN@36 for that of step 36; a
            checkpoint's directory or anything else, which means itself.
        step: step of the checkpoint of a run's directory; None: the newest.

    Returns:
        The checkpoint, or `name`.

    Raises:
        InputError: the run has no such checkpoint, or the name means two things.
    """
    base, at, number = str(name).rpartition("@")
    if at and number.isdigit() and _root(Path(base)) is not None:
        if step is not None:
            raise InputError(f"step: {step}, and {name} names step {int(number)}")
        found = _of_run(Path(base), int(number))
        if name.exists():
            raise InputError(f"checkpoint: {name} is both itself and {found}; name the latter")
        return found
    if _root(name) is not None and not (name / MANIFEST).is_file():
        if (name / EXPORT_CONFIG).is_file():
            raise InputError(f"checkpoint: {name} is a run and an exported folder; name a checkpoint in it")
        return _of_run(name, step)
    if step is not None:
        raise InputError(f"step: {step}, and {name} is not a run's directory")
    return name


def _root(run: Path) -> CheckpointRoot | None:
    """Where a run's checkpoints are; `run` may also be that directory itself."""
    if (run / CHECKPOINTS).is_dir():
        return CheckpointRoot(run / CHECKPOINTS)
    return CheckpointRoot(run) if run.name == CHECKPOINTS and run.is_dir() else None


def _of_run(run: Path, step: int | None) -> Path:
    root = _root(run)
    complete = root.complete() if root else []
    if not complete:
        raise InputError(f"checkpoint: {run} has no complete checkpoint")
    if step is None:
        return complete[-1]
    by_step = {step_of(path): path for path in complete}
    if step not in by_step:
        more = len(by_step) - NAMED_STEPS
        there = ", ".join(map(str, list(by_step)[-NAMED_STEPS:])) + (
            f" and {more} before" if more > 0 else ""
        )
        raise InputError(f"checkpoint: {run} has no checkpoint of step {step}; it has {there}")
    return by_step[step]
