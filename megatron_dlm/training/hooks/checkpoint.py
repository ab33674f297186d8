"""Checkpoints during training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from megatron_dlm.checkpointing.async_writer import SavePlans
from megatron_dlm.checkpointing.layout import (
    PROGRESS_RECORD,
    RUN_RECORD,
    SAVE_REQUEST,
    CheckpointConfig,
    CheckpointRoot,
)
from megatron_dlm.checkpointing.manager import PendingSave
from megatron_dlm.interfaces import SaveError
from megatron_dlm.platform.codec import encode
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.platform.restarts import report_progress
from megatron_dlm.training.loop import Hook
from megatron_dlm.training.progress import StepReport, TrainingProgress
from megatron_dlm.training.session import Session

logger = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Saves every few steps and at the end, whether the run is done or asked to stop."""

    def __init__(self, root: CheckpointRoot, saved_step: int, parallel: ParallelState) -> None:
        self._root = root
        self._plans = SavePlans(parallel)
        self.saved_step = saved_step
        """Step of the newest complete checkpoint."""
        self._pending: PendingSave | None = None
        self._failures = 0

    def on_start(self, session: Session, progress: TrainingProgress) -> None:
        """Let ranks vote in each step on whether a checkpoint is still being written."""
        session.votes["writing"] = lambda: self._pending is not None and not self._pending.is_done()

    def after_step(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Save when due or asked to."""
        if self._pending and not session.agreed["writing"]:
            self.finish(session)
        config = session.config.checkpoint
        is_due = progress.step % config.save_every == 0 or progress.step in config.save_at
        if progress.save_requested or is_due:
            self._save(session, progress)

    def after_rollback(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Do not save again the checkpoint just loaded; it also satisfies a pending request to save."""
        self.saved_step = progress.step
        if progress.save_requested:
            self._forget_request(session)

    def on_end(self, session: Session, progress: TrainingProgress) -> None:
        """Save what has not been saved; here a failure is final."""
        self.finish(session)
        if progress.step != self.saved_step:
            self._failures = session.config.checkpoint.max_failed_saves
            self._save(session, progress)
            self.finish(session)
        # One that came too late to be seen has been answered too.
        self._forget_request(session)

    def _save(self, session: Session, progress: TrainingProgress) -> None:
        self.finish(session)
        records = {
            RUN_RECORD: {
                "config": encode(session.config),
                "vocabulary": encode(session.data.vocabulary),
                "tokenizer_fingerprint": session.data.tokenizer_fingerprint,
                "train_sha256": session.data.train_sha256,
            },
            PROGRESS_RECORD: {
                **progress.record(),
                "world_size": session.parallel.world_size,
                "data_plan": encode(session.plan),
            },
        }
        checkpoint = session.config.checkpoint
        with self._failures_counted(session, progress.step):
            self._pending = PendingSave(
                self._root,
                progress.step,
                session.denoiser,
                session.optimizer,
                session.parallel,
                self._plans,
                records,
                checkpoint.save_timeout_seconds,
            )
        if progress.save_requested:
            self._forget_request(session)
        if not checkpoint.async_save:
            self.finish(session)

    def _forget_request(self, session: Session) -> None:
        if session.parallel.rank == 0:
            with suppress(OSError):
                # What cannot be removed asks again after the next step.
                (session.config.directory / SAVE_REQUEST).unlink(missing_ok=True)

    def finish(self, session: Session) -> None:
        """Wait for a save that is under way; all ranks call it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self._failures_counted(session, pending.step):
            pending.finish()
            self.saved_step = pending.step
            self._failures = 0
            report_progress()
            if session.parallel.rank == 0:
                logger.info(f"saved {self._root.final(pending.step)} in {pending.seconds():.1f} s")
                self._remove_superfluous(session.config.checkpoint)

    def _remove_superfluous(self, config: CheckpointConfig) -> None:
        try:
            self._root.retain(config.keep_last, config.keep_every, config.save_at)
        except OSError as error:
            # The next save tries again; what it leaves is complete.
            logger.warning(f"older checkpoints stay: {error}")

    @contextmanager
    def _failures_counted(self, session: Session, step: int) -> Iterator[None]:
        """Warn of a failed save and continue; raise at `checkpoint.max_failed_saves` consecutive failures."""
        try:
            yield
        except SaveError as error:
            self._failures += 1
            failed = f"checkpoint of step {step} was not saved: {error}"
            if self._failures >= session.config.checkpoint.max_failed_saves:
                raise SaveError(failed) from error
            if session.parallel.rank == 0:
                logger.warning(f"{failed}; training goes on")
