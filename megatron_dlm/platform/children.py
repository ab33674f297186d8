"""Child processes that do not outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal

JOB_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""They ask a job to save and stop, and come to all its processes; its ranks decide what they mean."""
_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def die_with(parent: int) -> None:
    """End this process where its parent ends, however that ends.

    Args:
        parent: process id, from before the fork.
    """
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def leave_job_signals_to_the_parent() -> None:
    """Ignore what asks the job to stop; this process ends when its parent says so, or with it."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
