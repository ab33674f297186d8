"""Estimates with 95% intervals from replicates of the data with noise as large as the residuals'.

Functions of losses take and return arrays whose first axis has the data itself at index 0 and replicates of
it from index 1 on; so each quantity that is computed from them is an estimate and its replicates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_dlm.scaling.points import Floats

CONFIDENCE = 0.95
MOST_UNDEFINED = (1 - CONFIDENCE) / 2
"""Share of replicates without a value up to which an interval is given."""
METHOD = (
    "parametric bootstrap: normal noise of one size for all points of a family, pooled over its budgets; the "
    "size is drawn anew for each replicate from what the residuals leave possible (scaled inverse chi-square)"
)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    interval: tuple[float, float] | None
    """None: too many replicates have no value, so the data do not determine it."""


def estimate(values_S: Floats) -> Estimate:
    """The estimate of a quantity.

    Args:
        values_S: float64 [1 + replicates]: from the data, then from each replicate; NaN where undefined.

    Returns:
        The first value, with percentiles of the others.
    """
    replicates = values_S[1:]
    defined = replicates[~np.isnan(replicates)]
    if not len(defined) or len(defined) < (1 - MOST_UNDEFINED) * len(replicates):
        return Estimate(float(values_S[0]), None)
    low, high = np.percentile(defined, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2])
    ends = (float(low), float(high))
    return Estimate(float(values_S[0]), ends if np.isfinite(ends).all() else None)


def replicate(
    losses_n: Floats, fitted_n: Floats, degrees_of_freedom: int, count: int, rng: np.random.Generator
) -> Floats:
    """The data and replicates of them.

    Percentiles of replicates whose noise has one estimated size are as narrow as normal intervals and cover
    too seldom with few points; with a size drawn for each, they are as wide as Student's.

    Args:
        losses_n: float64 [n] measured losses.
        fitted_n: float64 [n] what the fit says of each.
        degrees_of_freedom: points less fitted numbers; below 1, the noise is unknown and replicates are NaN.
        count: number of replicates.
        rng: source of noise.

    Returns:
        float64 [1 + count, n].
    """
    if degrees_of_freedom < 1:
        unknown = np.full((count, len(losses_n)), math.nan)
        return np.concatenate([losses_n[None], unknown])
    squares = float(np.sum((losses_n - fitted_n) ** 2))
    sizes = np.sqrt(squares / rng.chisquare(degrees_of_freedom, size=(count, 1)))
    return np.concatenate([losses_n[None], fitted_n + sizes * rng.normal(size=(count, len(losses_n)))])
