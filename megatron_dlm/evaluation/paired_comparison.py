"""Whether a cheaper arithmetic is as good: differences of two models or runs at equal data and noise.

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
"""Steps follow each other, so the error is that of means over as many blocks of them."""


@dataclass(frozen=True, kw_only=True)
class TrainingDifference:
    """What two runs' training bounds differ by, B less A, over the second half of their common steps."""

    difference: Mean
    steps: int
    """Common steps in all."""
    first_step: int
    """First of the steps that are compared."""
    largest: float
    """Difference of one step, nats/token, without sign."""


def training_difference(
    a: Mapping[int, tuple[int, float]], b: Mapping[int, tuple[int, float]]
) -> TrainingDifference:
    """Compare two runs step by step.

    Args:
        a: noise fingerprint and bound, nats/token, of each logged step.
        b: the same of the other run.

    Returns:
        The difference over the second half.

    Raises:
        InputError: fewer than 200 common steps, or a step with other noise or data.
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
    """Whether all of the interval lies below the tolerance.

    Args:
        difference: B less A, nats/token.
        tolerance: nats/token.

    Returns:
        False also where there is no interval.
    """
    return difference.high is not None and difference.high <= tolerance
