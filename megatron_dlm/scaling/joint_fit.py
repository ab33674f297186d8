"""The joint form of a scaling law: loss = E + A / N^a + B / D^b over all sizes and budgets of a family.

N is the number of parameters, D of training tokens (arXiv:2203.15556, equation 2). Two ways to fit it:
variable projection, which has no bias on noise-free data (arXiv:2603.22339), and Chinchilla's Huber loss on
logarithms. Where data are read repeatedly, D is the number of effective tokens, U + U R (1 - exp(-r / R)) for
U unique tokens read 1 + r times (arXiv:2305.16264, equation 5), with R one more number to fit.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares, leastsq, minimize_scalar, nnls

from megatron_dlm.interfaces import InputError
from megatron_dlm.scaling.estimates import replicate
from megatron_dlm.scaling.points import Floats, Points

EXPONENTS = np.geomspace(0.02, 2.0, 40)
"""Exponents of the first, dense search."""
LEAST_EXPONENT, MOST_EXPONENT = 0.005, 4.0
HUBER_DELTA = 1e-3
"""As Chinchilla has it, for residuals of log losses."""
MOST_EVALUATIONS = 100
"""Evaluations of the form after which a replicate's least squares end."""
LOG_READINGS = (math.log(0.1), math.log(1000.0))
"""Range of R, natural logarithms."""


@dataclass(frozen=True)
class JointLaw:
    """Coefficients of one fit, or of the data and its replicates; numbers, or arrays [1 + replicates]."""

    E: Floats
    """Loss that no size and no data reach, in nats per token."""
    log_A: Floats
    a: Floats
    log_B: Floats
    b: Floats
    log_R: Floats | None = None
    """Logarithm of the repetitions that count most; None: no data are read repeatedly."""

    def losses(self, parameters: Floats, tokens: Floats, unique_tokens: Floats) -> Floats:
        """Nats per token at sizes and numbers of tokens."""
        log_d = effective_log_tokens(tokens, unique_tokens, self.log_R)
        return np.asarray(
            self.E + np.exp(self.log_A - self.a * np.log(parameters)) + np.exp(self.log_B - self.b * log_d)
        )

    def numbers(self) -> tuple[Floats, ...]:
        """What the law is made of, in order."""
        found = (self.E, self.log_A, self.a, self.log_B, self.b)
        return found if self.log_R is None else (*found, self.log_R)

    def of_the_data(self) -> JointLaw:
        """The fit of the data without its replicates; numbers."""
        return JointLaw(*(number[0] for number in self.numbers()))

    def coefficients(self) -> dict[str, Floats]:
        """The coefficients by name."""
        found = {"E": self.E, "A": np.exp(self.log_A), "a": self.a, "B": np.exp(self.log_B), "b": self.b}
        return found if self.log_R is None else {**found, "R": np.exp(self.log_R)}


def effective_log_tokens(tokens: Floats, unique_tokens: Floats, log_R: Floats | None) -> Floats:
    """Logarithm of the number of tokens that count; those read for the first time all do."""
    if log_R is None:
        return np.asarray(np.log(tokens))
    again = np.maximum(tokens / unique_tokens - 1.0, 0.0)
    most = np.exp(log_R)
    with np.errstate(invalid="ignore"):
        counted = np.where(again > 0, unique_tokens * (1.0 - most * np.expm1(-again / most)), tokens)
    return np.asarray(np.log(counted))


def repeats_data(points: Points) -> bool:
    """Whether a run of a family reads tokens twice."""
    return bool(np.any(points.tokens > points.unique_tokens * (1 + 1e-6)))


def fit_by_projection(points: Points) -> JointLaw:
    """Least squares: for given exponents the coefficients are a non-negative least-squares problem.

    Args:
        points: trained models of one family, on at least six pairs of N and D.

    Returns:
        The law; a coefficient that the data do not need is 0, its logarithm minus infinity.

    Raises:
        InputError: too few points.
    """
    needed = 6 + repeats_data(points)
    if len(points) < needed:
        raise InputError(f"{points.family}: {len(points)} points, the joint form needs {needed}")
    if not repeats_data(points):
        return _projected(points, None)[0]

    def cost(log_R: float) -> float:
        return _projected(points, np.asarray(log_R))[1]

    trials = np.linspace(*LOG_READINGS, 24)
    best = int(np.argmin([cost(trial) for trial in trials]))
    around = (trials[max(best - 1, 0)], trials[min(best + 1, len(trials) - 1)])
    found = minimize_scalar(cost, bounds=around, method="bounded", options={"xatol": 1e-9})
    return _projected(points, np.asarray(found.x))[0]


def _projected(points: Points, log_R: Floats | None) -> tuple[JointLaw, float]:
    """The least-squares law for given R, and its sum of squares."""
    x = np.log(points.parameters)
    z = effective_log_tokens(points.tokens, points.unique_tokens, log_R)
    # Powers of sizes relative to the middle one, so that no column is tiny beside the others.
    x0, z0, losses = x.mean(), z.mean(), points.nats_per_token

    def design(exponents: Floats) -> Floats:
        a, b = exponents
        return np.stack([np.ones_like(x), np.exp(-a * (x - x0)), np.exp(-b * (z - z0))], axis=1)

    def residuals(exponents: Floats) -> Floats:
        columns = design(exponents)
        return np.asarray(columns @ nnls(columns, losses)[0] - losses)

    pairs = np.stack(np.meshgrid(EXPONENTS, EXPONENTS), axis=-1).reshape(-1, 2)
    start = min(pairs, key=lambda pair: float(np.sum(residuals(pair) ** 2)))
    # Tighter than needed for data with noise: without any, all numbers come back to 1e-6.
    found = least_squares(
        residuals, start, bounds=(LEAST_EXPONENT, MOST_EXPONENT), xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    a, b = found.x
    level, size, data = nnls(design(found.x), losses)[0]
    with np.errstate(divide="ignore"):
        law = JointLaw(
            E=np.asarray(level),
            log_A=np.log(size) + a * x0,
            a=np.asarray(a),
            log_B=np.log(data) + b * z0,
            b=np.asarray(b),
            log_R=log_R,
        )
    return law, 2 * float(found.cost)


def fit_by_huber(points: Points) -> JointLaw:
    """Chinchilla's way: Huber loss on log losses, the best of many starts.

    Args:
        points: trained models of one family.

    Returns:
        The law.
    """
    x, z = np.log(points.parameters), np.log(points.tokens)
    x0, z0, log_losses = x.mean(), z.mean(), np.log(points.nats_per_token)

    def terms(numbers: Floats) -> Floats:
        log_e, log_a, a, log_b, b = numbers
        return np.stack([np.full_like(x, log_e), log_a - a * (x - x0), log_b - b * (z - z0)])

    def residuals(numbers: Floats) -> Floats:
        return np.asarray(np.logaddexp.reduce(terms(numbers), axis=0) - log_losses)

    def slopes(numbers: Floats) -> Floats:
        shares = np.exp(terms(numbers) - np.logaddexp.reduce(terms(numbers), axis=0))
        return np.stack(
            [shares[0], shares[1], -(x - x0) * shares[1], shares[2], -(z - z0) * shares[2]], axis=1
        )

    starts = [
        (log_e, math.log(0.5), a, math.log(0.5), b)
        for log_e in (-1.0, 0.0, float(log_losses.min()) - 0.2)
        for a in (0.1, 0.3, 0.6, 1.2)
        for b in (0.1, 0.3, 0.6, 1.2)
    ]

    def solve(start: Floats, evaluations: int) -> Any:
        return least_squares(
            residuals,
            start,
            jac=slopes,
            loss="huber",
            f_scale=HUBER_DELTA,
            x_scale="jac",
            max_nfev=evaluations,
        )

    # All starts a part of the way, the best of them to its end.
    best = min((solve(np.array(start), 25) for start in starts), key=lambda each: float(each.cost))
    log_e, log_a, a, log_b, b = solve(best.x, 1000).x
    return JointLaw(np.exp(log_e), log_a + a * x0, np.asarray(a), log_b + b * z0, np.asarray(b))


def replicate_projection(
    points: Points, law: JointLaw, replicates: int, rng: np.random.Generator
) -> JointLaw:
    """The law with its replicates.

    Args:
        points: trained models of one family.
        law: result of `fit_by_projection`.
        replicates: number of replicates.
        rng: source of their noise.

    Returns:
        Coefficients [1 + replicates]. If a coefficient of `law` is 0, replicates are NaN: they say nothing
        where the data do not need the whole form.
    """
    start = np.array([float(number) for number in law.numbers()])
    table = np.full((1 + replicates, len(start)), math.nan)
    table[0] = start
    if np.all(np.isfinite(start)):
        fitted = law.losses(points.parameters, points.tokens, points.unique_tokens)
        freedom = len(points) - len(start)
        losses_Sn = replicate(points.nats_per_token, fitted, freedom, replicates, rng)
        if not np.isnan(losses_Sn).any():
            refit = _Refit(points, start)
            with warnings.catch_warnings():
                # It warns where the form does not fit, and stops there.
                warnings.simplefilter("ignore", RuntimeWarning)
                table[1:] = [refit(losses_n) for losses_n in losses_Sn[1:]]
    return JointLaw(*table.T)


class _Refit:
    """Least squares from a known start, a hundred times faster than the dense search."""

    def __init__(self, points: Points, start: Floats) -> None:
        self._x, self._points = np.log(points.parameters), points
        self._x0, self._z0 = self._x.mean(), np.log(points.tokens).mean()
        self._start = self._centered(start, 1.0)

    def __call__(self, losses_n: Floats) -> Floats:
        found = self._solve(losses_n, self._start)
        if found[0] < 0:
            # The loss without end is not below 0.
            found = np.concatenate([[0.0], self._solve(losses_n, self._start[1:])])
        return self._centered(found, -1.0)

    def _centered(self, numbers: Floats, sign: float) -> Floats:
        """Coefficients A and B of sizes relative to the middle one (sign 1), or back (sign -1)."""
        moved = numbers.copy()
        moved[1] -= sign * numbers[2] * self._x0
        moved[3] -= sign * numbers[4] * self._z0
        return moved

    def _solve(self, losses_n: Floats, start: Floats) -> Floats:
        """With E among the numbers, or without, as 0."""
        skipped = len(self._start) - len(start)

        def whole(numbers: Floats) -> Floats:
            return np.concatenate([np.zeros(skipped), numbers])

        def residuals(numbers: Floats) -> Floats:
            level, size, data, _ = self._terms(whole(numbers))
            return np.asarray(level + size + data - losses_n)

        def slopes(numbers: Floats) -> Floats:
            return self._slopes(whole(numbers))[:, skipped:]

        found = leastsq(residuals, start, Dfun=slopes, xtol=1e-9, ftol=1e-9, maxfev=MOST_EVALUATIONS)
        return np.asarray(found[0])

    def _terms(self, numbers: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        level, log_a, a, log_b, b, *log_r = numbers
        z = effective_log_tokens(
            self._points.tokens, self._points.unique_tokens, np.asarray(log_r[0]) if log_r else None
        )
        size, data = np.exp(log_a - a * (self._x - self._x0)), np.exp(log_b - b * (z - self._z0))
        return np.asarray(level), size, data, z

    def _slopes(self, numbers: Floats) -> Floats:
        _, size, data, z = self._terms(numbers)
        columns = [
            np.ones_like(size),
            size,
            -(self._x - self._x0) * size,
            data,
            -(z - self._z0) * data,
        ]
        if len(numbers) == 6:
            most = math.exp(numbers[5])
            unique, tokens = self._points.unique_tokens, self._points.tokens
            part = np.maximum(tokens / unique - 1.0, 0.0) / most
            gain = np.where(part > 0, 1.0 - np.exp(-part) * (1.0 + part), 0.0)
            counted = np.exp(z)
            grown = np.where(gain > 0, most * np.where(np.isfinite(unique), unique, 0.0) * gain, 0.0)
            columns.append(-numbers[4] * data * grown / counted)
        return np.stack(columns, axis=1)
