"""Requests from outside to save or to stop."""

from __future__ import annotations

import logging
import os
import time

import torch
import torch.distributed as dist

from megatron_dlm.checkpointing.layout import SAVE_REQUEST
from megatron_dlm.training.loop import Hook
from megatron_dlm.training.progress import StepReport, TrainingProgress
from megatron_dlm.training.session import Session
from megatron_dlm.training.signals import StopSignals

logger = logging.getLogger(__name__)


class RequestHook(Hook):
    """Handles requests to save or stop a run: signals, the time limit, a file in the run's directory."""

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        self._started_at = time.monotonic()

    def on_start(self, session: Session, progress: TrainingProgress) -> None:
        """Make no step where a signal has come before the first; the time limit lets each start make one."""
        config, is_first = session.config, session.parallel.rank == 0
        limit_seconds = 60 * config.checkpoint.stop_after_minutes
        begun = torch.tensor(int(self._signals.received), device=session.parallel.device)
        dist.all_reduce(begun, op=dist.ReduceOp.MAX)
        progress.stop_requested = bool(begun)

        def must_stop() -> bool:
            late = bool(limit_seconds) and time.monotonic() - self._started_at > limit_seconds
            return self._signals.received or late

        # Among all ranks, so that none waits for one that has left.
        session.votes["stop"] = must_stop
        session.votes["save"] = lambda: is_first and os.path.exists(config.directory / SAVE_REQUEST)

    def after_step(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Stop or save after this step, or where asked late in it, after the next."""
        progress.stop_requested = session.agreed["stop"]
        if progress.stop_requested and not self._signals.received and session.parallel.rank == 0:
            logger.warning("asked to stop by checkpoint.stop_after_minutes or a signal to another rank")
        progress.save_requested = session.agreed["save"]

    def after_rollback(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Stop or save all the same."""
        self.after_step(session, progress, report)
