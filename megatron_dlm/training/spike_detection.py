"""Losses and gradient norms far above those of the last steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

WINDOW = 128
"""Number of past steps that a new step is compared with, as in OLMo's step-skipping optimizer."""
FEWEST = 32
"""Number of past steps needed; with fewer of them nothing counts as a spike."""


def spike_limit(recent: Sequence[float], sigmas: float) -> float:
    """The largest value that is no spike.

    Args:
        recent: values of the last steps.
        sigmas: standard deviations above their mean that are allowed; 0 allows everything.

    Returns:
        The limit; infinity where there are too few values.
    """
    if not sigmas or len(recent) < FEWEST:
        return math.inf
    return statistics.fmean(recent) + sigmas * statistics.pstdev(recent)


def extended(recent: Sequence[float], value: float) -> tuple[float, ...]:
    """The last WINDOW values with one more."""
    return (*recent, value)[-WINDOW:]
