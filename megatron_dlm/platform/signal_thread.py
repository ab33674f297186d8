"""Signals that are handled at once, also while the main thread waits in code that is not Python's."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType

from megatron_dlm.platform.subprocess_lifetime import JOB_SIGNALS


def job_signals() -> tuple[signal.Signals, ...]:
    """Signals that ask this process's job to stop; without SIGHUP where it is ignored, as under nohup."""
    return tuple(
        number
        for number in JOB_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    )


def handle_in_thread(numbers: Iterable[int], handle: Callable[[int], None]) -> None:
    """Let a thread call `handle` for each signal that this process receives; the main thread must call this.

    Python runs handlers in the main thread, between two of its instructions: in a collective or a connection
    that never ends, never.

    Args:
        numbers: signals to handle.
        handle: takes the number of a signal; runs in the thread, one signal at a time.
    """
    wanted = frozenset(int(number) for number in numbers)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A child's signals are not its parent's.
    os.register_at_fork(after_in_child=_forget_parents_pipe)
    for number in wanted:
        # The interpreter writes to the pipe only what has a handler.
        signal.signal(number, _leave_to_the_thread)

    def watch() -> None:
        while received := os.read(reader, 1):
            if received[0] in wanted:
                handle(received[0])

    threading.Thread(target=watch, name="signals", daemon=True).start()


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Handler of the main thread, which has nothing to do."""


def _forget_parents_pipe() -> None:
    signal.set_wakeup_fd(-1)
