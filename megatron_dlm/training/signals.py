"""Signals that ask a run to save and stop."""

from __future__ import annotations

import logging
import os
import signal
import time

from megatron_dlm.platform.exit_codes import EXIT_PREEMPTED, FIRST_OF_SIGNALS
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.signal_thread import handle_in_thread, job_signals

logger = logging.getLogger(__name__)
REPEATED_SIGNAL_SECONDS = 5.0


class StopSignals:
    """Handles SIGTERM, SIGUSR1, SIGINT and SIGHUP, which schedulers and terminals send before they end a job.

    The first signal asks the run to save and stop; before the process groups exist there is nothing to save,
    and the process ends at once. A second signal also ends it at once, but only if it comes more than
    REPEATED_SIGNAL_SECONDS after the first: launchers deliver one signal twice (to the process and to its
    group). Both hold while the process waits for others. After the last save signals change nothing, which
    launchers send to those that end last. SIGHUP stays ignored where it is at the start, as under nohup.
    """

    def __init__(self) -> None:
        self.received = False
        self.ranks_have_met = False
        self.run_has_ended = False
        self._received_at = 0.0
        self._is_first_rank = detect_environment().rank == 0
        handle_in_thread(job_signals(), self._receive)

    def _receive(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.run_has_ended:
            return
        if not self.ranks_have_met:
            self._tell(f"{name} before the first step: ends with exit code {EXIT_PREEMPTED}, nothing to save")
            os._exit(EXIT_PREEMPTED)
        if not self.received:
            self.received, self._received_at = True, time.monotonic()
            self._tell(f"{name}: saving and stopping; once more, later, ends at once")
        elif time.monotonic() - self._received_at > REPEATED_SIGNAL_SECONDS:
            self._tell(f"{name} again: ends at once, unsaved")
            os._exit(FIRST_OF_SIGNALS + number)

    def _tell(self, message: str) -> None:
        if self._is_first_rank:
            logger.warning(message)
