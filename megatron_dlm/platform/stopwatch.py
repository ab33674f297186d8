"""Time that a rank spends on its own share of a step, before it waits for others."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Measures from `start` to `stop`; on a GPU by events in its queue, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._begin: float | torch.cuda.Event = 0.0
        self._end: float | torch.cuda.Event = 0.0

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begin to measure."""
        self._begin = self._end = self._now()

    def stop(self) -> None:
        """End the measurement; a later call moves its end."""
        self._end = self._now()

    def seconds(self) -> float:
        """Measured time; on a GPU something made after `stop` must have been read before."""
        if isinstance(self._begin, float) or isinstance(self._end, float):
            return float(self._end) - float(self._begin)  # type: ignore[arg-type]
        return float(self._begin.elapsed_time(self._end)) / 1e3
