"""95% intervals of means, by Student's t: a normal interval is too narrow for a handful of values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Mean:
    """An estimate with its 95% interval."""

    nats_per_token: float
    low: float | None
    """Lower end of the interval in nats/token; None if there is only one value."""
    high: float | None
    """Upper end of the interval in nats/token; None if there is only one value."""


def half_width(standard_error: float, count: int) -> float:
    """Half the width of a 95% interval of a mean.

    The interval holds for values that are about normal. With few, skewed values it covers the mean less
    often than 95%; tools/bench/intervals.py measures how often.

    Args:
        standard_error: standard error of the mean, estimated from the values.
        count: number of independent values, at least 2.

    Returns:
        Half width in the unit of the values.
    """
    return float(special.stdtrit(count - 1, 0.5 + CONFIDENCE / 2) * standard_error)


def interval(mean: float, standard_error: float | None, count: int) -> Mean:
    """A mean of independent values with its interval.

    Args:
        mean: mean in nats per token.
        standard_error: standard error of the mean; None if there is only one value.
        count: number of independent values.

    Returns:
        Mean, with its interval if `standard_error` is given.
    """
    if standard_error is None:
        return Mean(nats_per_token=mean, low=None, high=None)
    half = half_width(standard_error, count)
    return Mean(nats_per_token=mean, low=mean - half, high=mean + half)


def block_means(values: ArrayLike, num_blocks: int) -> Mean:
    """The mean of values that depend on their neighbours, with an interval from means over blocks of them.

    Args:
        values: [n] nats per token, in order.
        num_blocks: blocks of neighbours, of nearly equal size, far longer than the dependence.

    Returns:
        The mean over all values with its interval.
    """
    numbers = np.asarray(values, dtype=np.float64)
    means = np.array([block.mean() for block in np.array_split(numbers, num_blocks)])
    return interval(float(numbers.mean()), float(means.std(ddof=1) / math.sqrt(num_blocks)), num_blocks)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, which also holds at shares of 0 and 1.

    Args:
        successes: number of successes in `count` trials.
        count: number of trials, at least 1.

    Returns:
        Lower and upper end of the interval, in [0, 1].
    """
    # As large an import as NumPy's own, for this alone.
    from scipy import stats

    found = stats.binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def leader(costs_C: Sequence[NDArray[np.float64]], *, confidence: float, looks: int) -> int | None:
    """The choice with the lowest mean cost, if it leads with enough confidence.

    One-sided paired t tests compare the cheapest choice with each of the others. The allowed error is divided
    by the number of other choices and by `looks` (Bonferroni), so that over all looks together a choice that
    is not truly the cheapest is returned with probability at most 1 - confidence.

    Args:
        costs_C: float64 [n] costs of each choice; the i-th costs of all choices are paired.
        confidence: probability, in [0.5, 1), that the returned choice is truly the cheapest.
        looks: total number of times this test is made as n grows.

    Returns:
        Index of the choice; None if no choice leads with enough confidence.
    """
    best = min(range(len(costs_C)), key=lambda choice: float(costs_C[choice].mean()))
    count = len(costs_C[best])
    if count < 2:
        return None
    level = 1 - (1 - confidence) / ((len(costs_C) - 1) * looks)
    quantile = float(special.stdtrit(count - 1, level))
    for choice, costs in enumerate(costs_C):
        lead = costs - costs_C[best]
        if choice != best and not lead.mean() > quantile * lead.std(ddof=1) / math.sqrt(count):
            return None
    return best
