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
    """Lower end of the interval; None where there is one value only."""
    high: float | None
    """Upper end of the interval; None where there is one value only."""


def half_width(standard_error: float, count: int) -> float:
    """Half the width of a 95% interval of a mean.

    It holds for values that are about normal. Of few and skewed values fewer intervals cover the mean:
    tools/bench/intervals.py measures how many.

    Args:
        standard_error: of the mean, from the values' own spread.
        count: independent values, at least 2.

    Returns:
        In the unit of the values.
    """
    return float(special.stdtrit(count - 1, 0.5 + CONFIDENCE / 2) * standard_error)


def interval(mean: float, standard_error: float | None, count: int) -> Mean:
    """A mean of independent values with its interval.

    Args:
        mean: nats per token.
        standard_error: of the mean; None with one value.
        count: independent values.

    Returns:
        With the interval where there are two values or more.
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
        successes: of `count` trials.
        count: at least 1.

    Returns:
        Lower and upper end.
    """
    # As large an import as NumPy's own, for this alone.
    from scipy import stats

    found = stats.binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def leader(costs_C: Sequence[NDArray[np.float64]], *, confidence: float, looks: int) -> int | None:
    """The choice that costs least, where it is sure enough.

    One-sided paired t tests of the cheapest choice against each other one. The allowed error is divided by
    the number of the others and of looks (Bonferroni), so that over all looks together another choice than
    the truly cheapest is taken for sure with a probability of at most 1 - confidence.

    Args:
        costs_C: float64 [n] for each choice; the n-th costs of all choices belong together.
        confidence: in [0.5, 1); that the leader is the right one.
        looks: how often, as n grows, this is asked in all.

    Returns:
        Its index; None where it is not sure.
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
