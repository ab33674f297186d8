"""What a run says of itself: what it is, what it starts from, and how it ends."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from megatron_dlm.checkpointing.layout import PROGRESS_RECORD, read_json
from megatron_dlm.platform.exit_codes import EXIT_PREEMPTED
from megatron_dlm.platform.gpu import name_of
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.datasets import RunData
from megatron_dlm.run.description import describe_changes, describe_data, describe_layout
from megatron_dlm.run.run_record import OutsideStart, RunRecord, checkpoint_root, read_run_record
from megatron_dlm.telemetry.writers import duration

if TYPE_CHECKING:
    from megatron_dlm.training.progress import TrainingProgress

logger = logging.getLogger(__name__)


class Announcement:
    """Lines about a run as a whole, logged on rank 0."""

    def __init__(self, config: RunConfig, data: RunData, parallel: ParallelState) -> None:
        self._config = config
        self._data = data
        self._parallel = parallel
        self._began_at = time.monotonic()

    def _say(self, line: str) -> None:
        if self._parallel.rank == 0:
            logger.info(line)

    def has_ended_before(self, start: RunRecord | OutsideStart | None) -> bool:
        """Whether the run starts from its own last step; if so, it says so."""
        num_steps, directory = self._config.training.num_steps, self._config.directory
        if not isinstance(start, RunRecord) or not self._is_own(start):
            return False
        step = int(read_json(start.directory / PROGRESS_RECORD)["step"])
        if step < num_steps:
            return False
        self._say(f"{directory} has reached step {step} of {num_steps}; raise --training.num-steps to go on")
        return True

    def begins(self) -> None:
        """What the run is."""
        device = self._parallel.device
        where = "cpu" if device.type == "cpu" else name_of(device)
        for name, value in describe_layout(self._config, self._parallel.world_size).items():
            self._say(f"{name}: {value}" + (f", on {where}" if name == "processes" else ""))

    def starts_from(self, start: RunRecord | OutsideStart | None, progress: TrainingProgress) -> None:
        """Where the weights come from, what has changed since, and what data are to come."""
        config = self._config
        self._say(f"data: {describe_data(config, self._data, progress.consumed_samples, progress.step)}")
        if start is None:
            self._say("starts from scratch")
        elif isinstance(start, RunRecord) and config.checkpoint.branch_from and not self._is_own(start):
            self._say(f"continues from step {progress.step} as a branch of {start.directory}")
        elif not isinstance(start, RunRecord) or not self._is_own(start):
            self._say(f"starts from the weights of {start.directory}")
        elif self._parallel.rank == 0:
            # The newest may have been damaged, and set aside.
            loaded = read_run_record(checkpoint_root(config).complete()[-1])
            processes = int(read_json(loaded.directory / PROGRESS_RECORD)["world_size"])
            changed = describe_changes(loaded.config, config)
            if processes != self._parallel.world_size:
                changed = f"processes {processes} -> {self._parallel.world_size}" + (
                    changed and f", {changed}"
                )
            since = f"; changed since: {changed}" if changed else ""
            self._say(f"continues from step {progress.step} of {config.directory}{since}")

    def ends(self, progress: TrainingProgress) -> bool:
        """How far the run has come, and with which exit code it ends.

        Args:
            progress: progress after the last step and its save.

        Returns:
            True if that is the whole run.
        """
        num_steps = self._config.training.num_steps
        took = duration(time.monotonic() - self._began_at)
        if progress.step >= num_steps:
            self._say(f"done: step {num_steps} of {num_steps} in {took}")
            return True
        self._say(
            f"saved step {progress.step} of {num_steps} after {took}, exit code {EXIT_PREEMPTED}; "
            "the same command goes on"
        )
        return False

    def _is_own(self, start: RunRecord) -> bool:
        return start.directory.parent == checkpoint_root(self._config).path
