"""Metrics for Weights & Biases; needs the extra `wandb`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_dlm.telemetry.writers import FIRST_STEP, Metrics

PROJECT = "megatron-dlm"
"""Unless WANDB_PROJECT names another."""
STEP = "step"
Mode = Literal["offline", "online"]


def run_id(directory: Path) -> str:
    """The same id for every start in a directory, so that a resumed run goes on with its curves."""
    return hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:16]


class WandbWriter:
    """Curves `kind/name` over steps. Whatever goes wrong with W&B is an OSError, which never ends a run."""

    def __init__(self, directory: Path, config: Mapping[str, Any], mode: Mode) -> None:
        """`config`: the run's options by dotted name; `mode`: offline or online."""

        def start() -> Any:
            import wandb

            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=directory.name,
                id=run_id(directory),
                resume="allow",
                dir=str(directory),
                config=dict(config),
                mode=mode,
                settings=wandb.Settings(silent=True, console="off"),
            )
            # A rollback makes steps again, which W&B's own counter of steps refuses.
            run.define_metric("*", step_metric=STEP)
            return run

        self._run = _as_os_error(start)

    def write(self, kind: str, step: int, metrics: Metrics) -> None:
        """Log everything, texts too."""
        named = {f"{kind}/{name}": value for name, value in metrics.items() if name != FIRST_STEP}
        _as_os_error(lambda: self._run.log({STEP: step, **named}))

    def rewind(self, step: int) -> None:
        """Nothing: steps that are made again are drawn over the old ones."""

    def close(self) -> None:
        """Finish the run."""
        _as_os_error(self._run.finish)


def _as_os_error(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        raise OSError(f"Weights & Biases: {str(error).strip() or type(error).__name__}") from error
