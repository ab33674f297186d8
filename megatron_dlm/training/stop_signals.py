"""Signals that ask a run to save and stop, taken over from its first moment on."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

REPEATED_SIGNAL_SECONDS = 5.0


class StopSignals:
    """SIGTERM, SIGUSR1 and SIGINT, which schedulers and terminals send before they kill.

    Launchers deliver one signal twice (to the process and to its group), so only one that comes seconds
    later means "at once".
    """

    def __init__(self) -> None:
        self.received = False
        self._received_at = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._received_at = True, time.monotonic()
        elif time.monotonic() - self._received_at > REPEATED_SIGNAL_SECONDS:
            os._exit(128 + number)
