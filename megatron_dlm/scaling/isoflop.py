"""IsoFLOP parabolas: at each budget, a least-squares parabola of the loss in ln N, and its vertex.

Chinchilla's second approach (arXiv:2203.15556), as in arXiv:2602.15014. N is the number of parameters, D of
training tokens. A vertex is biased where the loss is not a parabola, even without noise (arXiv:2603.22339);
joint_fit.py has the other way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import make_interp_spline

from megatron_dlm.scaling.estimates import Estimate, estimate, replicate
from megatron_dlm.scaling.points import Floats, Points

LEAST_SIZES = 3
"""Sizes that a parabola needs."""


@dataclass(frozen=True)
class Optima:
    """Vertices of a budget; arrays are [1 + replicates], NaN where a parabola opens downwards."""

    points: Points
    parameters_S: Floats
    tokens_S: Floats
    nats_per_token_S: Floats
    curvature_S: Floats
    """Second derivative of the loss in ln N."""
    coefficients_3: Floats
    """Coefficients of the data's parabola in ln N - `center`, highest power first."""
    center: float

    @property
    def budget_flops(self) -> float:
        """FLOPs of each run."""
        return float(self.points.budget_flops[0])

    @property
    def remark(self) -> str:
        """Why the vertex says nothing of an optimum; empty if it does."""
        if not self.curvature_S[0] > 0:
            return "the parabola opens downwards"
        low, high = self.points.parameters.min(), self.points.parameters.max()
        if not low <= self.parameters_S[0] <= high:
            return f"the vertex {self.parameters_S[0]:.4g} lies outside its points, {low:.4g} to {high:.4g}"
        return ""

    def estimates(self) -> dict[str, Estimate]:
        """Vertex and curvature with intervals."""
        return {
            "parameters": estimate(self.parameters_S),
            "tokens": estimate(self.tokens_S),
            "nats_per_token": estimate(self.nats_per_token_S),
            "curvature": estimate(self.curvature_S),
        }

    def at(self, parameters: Floats) -> Floats:
        """The parabola's loss in nats per token at numbers of parameters."""
        return np.asarray(np.polyval(self.coefficients_3, np.log(parameters) - self.center))


@dataclass(frozen=True)
class IsoflopFit:
    """Parabolas of a family, smallest budget first."""

    family: str
    optima: tuple[Optima, ...]
    left_out: tuple[str, ...]
    """Budgets without a parabola, and why."""
    noise: float
    """Standard deviation of the residuals in nats per token, pooled over the budgets; NaN: unknown."""
    residuals: tuple[Floats, ...]
    """Measured less fitted losses of each budget in nats per token."""

    @property
    def usable(self) -> list[Optima]:
        """Budgets whose vertex is an optimum among its points."""
        return [optimum for optimum in self.optima if not optimum.remark]


def fit_isoflop(points: Points, replicates: int, rng: np.random.Generator) -> IsoflopFit:
    """Fit a parabola at each budget of a family.

    Args:
        points: trained models of the family.
        replicates: number of replicates for intervals.
        rng: source of their noise.

    Returns:
        The parabolas; budgets with fewer than three sizes are left out.
    """
    budgets, left_out = [], []
    for part in points.by_budget():
        sizes = len(np.unique(part.parameters))
        if sizes < LEAST_SIZES:
            left_out.append(
                f"{points.family} at {part.budget_flops[0]:g} FLOPs: {sizes} size{'s' * (sizes > 1)} "
                f"({part.describe_rows()}), a parabola needs {LEAST_SIZES}"
            )
        else:
            budgets.append(part)
    designs = [_Design(part) for part in budgets]
    fitted = [design.fitted(part.nats_per_token) for design, part in zip(designs, budgets, strict=True)]
    freedom = sum(len(part) - 3 for part in budgets)
    losses = np.concatenate([part.nats_per_token for part in budgets] or [np.empty(0)])
    smooth = np.concatenate(fitted or [np.empty(0)])
    noise = math.sqrt(float(np.sum((losses - smooth) ** 2)) / freedom) if freedom else math.nan
    table_Sn = replicate(losses, smooth, freedom, replicates, rng)
    ends = np.cumsum([len(part) for part in budgets])[:-1]
    tables = np.split(table_Sn, ends, axis=1) if budgets else []
    return IsoflopFit(
        family=points.family,
        optima=tuple(design.optima(table) for design, table in zip(designs, tables, strict=True)),
        left_out=tuple(left_out),
        noise=noise,
        residuals=tuple(part.nats_per_token - line for part, line in zip(budgets, fitted, strict=True)),
    )


class _Design:
    """The linear part of one budget's parabola."""

    def __init__(self, points: Points) -> None:
        self.points = points
        log_n = np.log(points.parameters)
        self.center = float(log_n.mean())
        self.powers_n3 = np.vander(log_n - self.center, 3)
        self._inverse_3n = np.linalg.pinv(self.powers_n3)

    def fitted(self, losses_n: Floats) -> Floats:
        return np.asarray(self.powers_n3 @ (self._inverse_3n @ losses_n))

    def optima(self, losses_Sn: Floats) -> Optima:
        coefficients_S3 = losses_Sn @ self._inverse_3n.T
        square, slope, level = coefficients_S3.T
        with np.errstate(divide="ignore", invalid="ignore"):
            place = np.where(square > 0, -slope / (2 * square), math.nan)
            loss = np.where(square > 0, level - slope**2 / (4 * square), math.nan)
        log_n_S = place + self.center
        return Optima(
            points=self.points,
            parameters_S=_exp(log_n_S),
            tokens_S=_exp(self._log_tokens(log_n_S)),
            nats_per_token_S=loss,
            curvature_S=2 * square,
            coefficients_3=coefficients_S3[0],
            center=self.center,
        )

    def _log_tokens(self, log_n_S: Floats) -> Floats:
        """Tokens that the budget pays for at other sizes: linear in logarithms between its sizes."""
        sizes, first = np.unique(np.log(self.points.parameters), return_index=True)
        line = make_interp_spline(sizes, np.log(self.points.tokens)[first], k=1)
        return np.asarray(line(log_n_S))


def _exp(logarithms: Floats) -> Floats:
    """Nearly flat parabolas have vertices beyond what a float holds."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(logarithms))


@dataclass(frozen=True)
class PowerLaw:
    """quantity = coefficient * C^exponent, by least squares in logarithms; arrays are [1 + replicates]."""

    quantity: str
    log_coefficient_S: Floats
    """Natural logarithm of the quantity at C = 1 FLOP."""
    exponent_S: Floats

    def estimates(self) -> dict[str, Estimate]:
        """Coefficient and exponent with intervals."""
        return {
            "coefficient": estimate(_exp(self.log_coefficient_S)),
            "exponent": estimate(self.exponent_S),
        }

    def log_at(self, budget_flops: float) -> Floats:
        """Natural logarithm of the quantity at a budget, [1 + replicates]."""
        return self.log_coefficient_S + self.exponent_S * math.log(budget_flops)


QUANTITIES = ("parameters", "tokens", "nats_per_token")


def fit_power_law(quantity: str, optima: Sequence[Optima]) -> PowerLaw:
    """A quantity of the optimum as a power of the budget.

    Args:
        quantity: one of QUANTITIES.
        optima: optima of at least two budgets.

    Returns:
        The law.
    """
    log_c_b = np.log([each.budget_flops for each in optima])
    with np.errstate(invalid="ignore"):
        # The vertex of a nearly flat parabola may lie below a loss of 0.
        values_Sb = np.log(np.stack([getattr(each, f"{quantity}_S") for each in optima], axis=1))
    center = log_c_b.mean()
    offsets_b = log_c_b - center
    exponent_S = values_Sb @ offsets_b / (offsets_b @ offsets_b)
    return PowerLaw(quantity, values_Sb.mean(axis=1) - exponent_S * center, exponent_S)
