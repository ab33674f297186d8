"""Signals that ask a run to save and stop."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

from megatron_dlm.platform.subprocess_lifetime import JOB_SIGNALS

REPEATED_SIGNAL_SECONDS = 5.0
EXIT_PREEMPTED = 3
"""Exit code of a run that a signal or its time limit stopped; the next start resumes from its checkpoint."""


class StopSignals:
    """Handles SIGTERM, SIGUSR1, SIGINT and SIGHUP, which schedulers and terminals send before they end a job.

    The first signal asks the run to save and stop; before the process groups exist there is nothing to save,
    and the process ends at once. A second signal also ends it at once, but only if it comes more than
    REPEATED_SIGNAL_SECONDS after the first: launchers deliver one signal twice (to the process and to its
    group). SIGHUP stays ignored where it is at the start, as under nohup.
    """

    def __init__(self) -> None:
        self.received = False
        self.ranks_have_met = False
        self._received_at = 0.0
        for number in JOB_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.ranks_have_met:
            os._exit(EXIT_PREEMPTED)
        if not self.received:
            name = signal.Signals(number).name
            print(f"{name}: saving and stopping; once more, later, ends at once", file=sys.stderr, flush=True)
            self.received, self._received_at = True, time.monotonic()
        elif time.monotonic() - self._received_at > REPEATED_SIGNAL_SECONDS:
            os._exit(128 + number)
