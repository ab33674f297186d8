"""Watches for steps that do not end."""

from __future__ import annotations

import faulthandler
import math
import signal
import time

from megatron_dlm.training.loop import Hook
from megatron_dlm.training.progress import StepReport, TrainingProgress
from megatron_dlm.training.session import Session


class WatchdogHook(Hook):
    """Prints all thread stacks and ends the process if a step takes too long; SIGUSR2 only prints them."""

    def __init__(self) -> None:
        self._started = -math.inf

    def on_start(self, session: Session, progress: TrainingProgress) -> None:
        """Begin to watch."""
        # NCCL's own watchdog ends a process that waits in vain by SIGABRT.
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR2)
        self._watch(session)

    def after_step(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Restart the timer for the next step."""
        self._watch(session)

    def after_rollback(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Restart the timer for the next step."""
        self._watch(session)

    def on_end(self, session: Session, progress: TrainingProgress) -> None:
        """Restart the timer: the last save may take as long as a step."""
        self._watch(session)

    def _watch(self, session: Session) -> None:
        timeout = session.config.training.step_timeout_seconds
        # Each call starts a thread, which costs small models part of their step: within a hundredth of the
        # timeout, the timer that runs will do.
        now = time.monotonic()
        if now - self._started < timeout / 100:
            return
        self._started = now
        # A thread in C: it also wakes where Python hangs.
        faulthandler.dump_traceback_later(timeout, exit=True)


def stop_watching() -> None:
    """No step is under way any more."""
    faulthandler.cancel_dump_traceback_later()
