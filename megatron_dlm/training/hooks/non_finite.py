"""What happens after a step whose loss or gradient is not finite, or a spike: skip it, stop, or go back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import numpy as np

from megatron_dlm.interfaces import TrainingError
from megatron_dlm.platform.codec import encode
from megatron_dlm.platform.files import write_json
from megatron_dlm.training.loop import Hook
from megatron_dlm.training.progress import StepReport, TrainingProgress
from megatron_dlm.training.session import Session

logger = logging.getLogger(__name__)
NAMED_SAMPLES = 8
"""Most sample positions that a line names."""


class NonFiniteHook(Hook):
    """Acts on steps that changed no parameter; all ranks see the same report and do the same.

    Must come before hooks that assume that the step changed the parameters.
    """

    def __init__(self, roll_back: Callable[[], TrainingProgress]) -> None:
        """`roll_back` reloads the newest checkpoint and gives its progress; all ranks call it."""
        self._roll_back = roll_back
        self._in_a_row = 0
        self._rolled_back: Counter[int] = Counter()

    def after_step(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Skip, stop or roll back, as configured."""
        if report.applied:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        config, first = session.config.training, session.parallel.rank == 0
        what = self._describe(progress, report)
        if config.on_non_finite == "stop" or self._in_a_row >= config.max_skipped_steps:
            if first:
                self._dump(session, progress, report)
            raise TrainingError(
                f"{what}, {self._in_a_row} such steps in a row; tools/replay_step.py "
                f"{session.config.directory / self._name(progress)}.json runs its samples once more"
            )
        if config.on_non_finite == "rollback":
            saved = self._roll_back()
            self._rolled_back[saved.step] += 1
            if self._rolled_back[saved.step] > config.max_skipped_steps:
                raise TrainingError(f"{what}, rolled back to step {saved.step} too often")
            progress.go_back_to(saved)
            what += f"; back to step {saved.step}"
        if first:
            logger.warning(f"{what}; no parameter was changed")

    def _describe(self, progress: TrainingProgress, report: StepReport) -> str:
        named = ", ".join(map(str, report.bad_samples[:NAMED_SAMPLES]))
        more = len(report.bad_samples) - NAMED_SAMPLES
        rest = f" and {more} more" if more > 0 else ""
        return f"{report.fault} in step {report.step}, samples {named}{rest}"

    def _name(self, progress: TrainingProgress) -> str:
        return f"bad-step-{progress.step:08d}"

    def _dump(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Write what tools/replay_step.py needs: configuration, step, samples as the network saw them."""
        directory, first_sample = session.config.directory, progress.consumed_samples - report.batch_size
        record = {
            "config": encode(session.config),
            "step": progress.step,
            "consumed_samples": first_sample,
            "fault": report.fault,
            "samples": list(report.bad_samples),
        }
        write_json(directory / f"{self._name(progress)}.json", record)
        arrays = session.corrupted(progress.step - 1, first_sample, np.array(report.bad_samples))
        np.savez(directory / f"{self._name(progress)}.npz", allow_pickle=False, **arrays)
