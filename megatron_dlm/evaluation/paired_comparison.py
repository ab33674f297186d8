"""Whether a lower precision is as good: differences of two models or runs at equal data and noise.

The question is one-sided: B may be better than A, and may be worse by no more than a tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_dlm.evaluation.intervals import Mean, block_means
from megatron_dlm.interfaces import InputError

LEAST_STEPS = 200
BLOCKS = 10
"""Number of blocks of consecutive steps; the error is taken over block means, since steps are correlated."""


@dataclass(frozen=True, kw_only=True)
class TrainingDifference:
    """Difference B - A of two runs' training bounds over the second half of their common steps."""

    difference: Mean
    """Mean difference in nats/token, with its interval."""
    steps: int
    """Number of common logged steps."""
    first_step: int
    """First step of the compared second half."""
    largest: float
    """Largest absolute difference at a single step, in nats/token."""


def training_difference(
    a: Mapping[int, tuple[int, float]], b: Mapping[int, tuple[int, float]]
) -> TrainingDifference:
    """Compare two runs step by step.

    Args:
        a: noise fingerprint and bound (nats/token) of run A by logged step.
        b: noise fingerprint and bound (nats/token) of run B by logged step.

    Returns:
        Difference over the second half of the common steps.

    Raises:
        InputError: too few common steps, a step whose noise or data differ, or a bound that is not finite.
    """
    steps = sorted(a.keys() & b.keys())
    last = steps[-1] if steps else 0
    if last < LEAST_STEPS or len(steps) < 2 * BLOCKS:
        raise InputError(
            f"a, b: {len(steps)} logged steps in common, up to {last}; a comparison takes "
            f"{LEAST_STEPS} steps, and {2 * BLOCKS} of them logged (telemetry.log_every)"
        )
    for step in steps:
        if a[step][0] != b[step][0]:
            raise InputError(f"a, b: step {step} has other noise or data in the two runs")
    later = steps[len(steps) // 2 :]
    differences = np.array([b[step][1] - a[step][1] for step in later])
    if not np.isfinite(differences).all():
        raise InputError("a, b: a logged bound is not finite")
    return TrainingDifference(
        difference=block_means(differences, BLOCKS),
        steps=len(steps),
        first_step=later[0],
        largest=float(np.abs(differences).max()),
    )


def passes(difference: Mean, tolerance: float) -> bool:
    """Whether the interval's upper end is at most the tolerance.

    Args:
        difference: difference B - A in nats/token.
        tolerance: largest accepted difference in nats/token.

    Returns:
        True if B passes; False if it does not or if there is no interval.
    """
    return difference.high is not None and difference.high <= tolerance
