"""The size with the lowest loss at a budget by the joint form, and how far a parabola's vertex is from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from megatron_dlm.scaling.estimates import Estimate, estimate
from megatron_dlm.scaling.isoflop import QUANTITIES, fit_isoflop
from megatron_dlm.scaling.joint_fit import JointLaw
from megatron_dlm.scaling.points import Floats, Points

ROUNDS = 50


class TokenCost:
    """FLOPs of a training token by size: a parabola in logarithms through the points of a family."""

    def __init__(self, points: Points) -> None:
        log_n = np.log(points.parameters)
        self._center = float(log_n.mean())
        degree = min(2, len(np.unique(points.parameters)) - 1)
        cost = np.log(points.budget_flops / points.tokens)
        self._coefficients = np.polyfit(log_n - self._center, cost, degree)
        self._slopes = np.polyder(self._coefficients)

    def log_at(self, log_n: Floats) -> Floats:
        """Natural logarithm of the FLOPs."""
        return np.asarray(np.polyval(self._coefficients, log_n - self._center))

    def slope_at(self, log_n: Floats) -> Floats:
        """Its derivative."""
        return np.asarray(np.polyval(self._slopes, log_n - self._center))


def joint_optimum(law: JointLaw, cost: TokenCost, budget_flops: float) -> tuple[Floats, Floats, Floats]:
    """Where the joint form is lowest at a budget; every token is read once.

    There a A / N^a = s b B / D^b, with s the slope of ln(FLOPs of a token) in ln N. With a constant slope
    that has a closed solution, which is repeated with the slope at the solution.

    Args:
        law: coefficients, numbers or arrays [1 + replicates].
        cost: FLOPs of a token.
        budget_flops: FLOPs of the run.

    Returns:
        N, D and nats per token, shaped as the coefficients; NaN where there is no such place.
    """
    log_c = math.log(budget_flops)
    log_n = np.full_like(np.asarray(law.E, dtype=np.float64), math.nan)
    log_n = np.where(np.isfinite(law.log_A + law.log_B), cost._center, log_n)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for _ in range(ROUNDS):
            slope = cost.slope_at(log_n)
            log_k = cost.log_at(log_n) - slope * log_n
            push = np.log(law.a) + law.log_A - np.log(slope) - np.log(law.b) - law.log_B
            log_n = (push + law.b * (log_c - log_k)) / (law.a + slope * law.b)
        tokens = np.exp(log_c - cost.log_at(log_n))
        parameters = np.exp(log_n)
        return parameters, tokens, law.losses(parameters, tokens, np.full_like(tokens, math.inf))


def parabola_bias(law: JointLaw, cost: TokenCost, points: Points) -> tuple[float, float]:
    """What a parabola through noise-free losses of the joint form would find at a budget.

    Args:
        law: coefficients of the data, numbers.
        cost: FLOPs of a token.
        points: points of one budget.

    Returns:
        Its vertex N over the form's optimum N, and its vertex loss less the form's in nats per token; NaN
        with fewer than three sizes.
    """
    losses = law.losses(points.parameters, points.tokens, np.full_like(points.tokens, math.inf))
    parabolas = fit_isoflop(replace(points, nats_per_token=losses), 0, np.random.default_rng(0)).optima
    if not parabolas:
        return math.nan, math.nan
    parameters, _, loss = joint_optimum(law, cost, float(points.budget_flops[0]))
    vertex = parabolas[0]
    return (
        float(vertex.parameters_S[0] / parameters),
        float(vertex.nats_per_token_S[0] - loss),
    )


@dataclass(frozen=True)
class JointOptimum:
    """The joint form's optimum at a budget."""

    budget_flops: float
    estimates: dict[str, Estimate]
    """N, D and nats per token, by the names of `isoflop.QUANTITIES`."""
    parabola_parameters_ratio: float
    """N that a parabola finds on the form's surface without noise, over the form's; NaN: it finds none."""
    parabola_nats_difference: float
    """Its loss less the form's, in nats per token."""


def joint_optima(projection: JointLaw, cost: TokenCost, points: Points) -> tuple[JointOptimum, ...]:
    """The joint form's optimum at each budget of its points.

    Args:
        projection: coefficients with replicates, arrays [1 + replicates].
        cost: FLOPs of a token.
        points: points of all budgets.

    Returns:
        The optima, smallest budget first.
    """
    law, found = projection.of_the_data(), []
    for part in points.by_budget():
        budget = float(part.budget_flops[0])
        values = joint_optimum(projection, cost, budget)
        estimates = {name: estimate(each) for name, each in zip(QUANTITIES, values, strict=True)}
        found.append(JointOptimum(budget, estimates, *parabola_bias(law, cost, part)))
    return tuple(found)
