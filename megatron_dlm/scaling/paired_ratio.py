"""FLOPs ratio of two families from runs that share size, budget, seed and data.

What such runs have in common, from the order of the data to the noise of the validation, is not in the
difference of their losses, which therefore tells smaller effects apart than two separate fits do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from megatron_dlm.scaling.estimates import Estimate, estimate, replicate
from megatron_dlm.scaling.isoflop import IsoflopFit, Optima
from megatron_dlm.scaling.points import Floats, Points


@dataclass(frozen=True)
class PairedRatio:
    """At one budget, or over all of them."""

    family: str
    reference: str
    budget_flops: float | None
    """None: the geometric mean over all budgets."""
    num_pairs: int
    seeds_per_point: float
    """Pairs of one size and budget."""
    nats_difference: Estimate
    """Loss of the family less the reference's, at the reference's best size."""
    ratio: Estimate
    """FLOPs of the family over those of the reference at equal loss."""

    @property
    def width(self) -> float:
        """Width of the ratio's interval, in logarithms; infinite where there is none."""
        if self.ratio.interval is None:
            return math.inf
        low, high = self.ratio.interval
        return math.log(high) - math.log(low) if low > 0 else math.inf

    def resolves(self, effect: float) -> bool:
        """Whether the interval is narrower than a saving of a share of the FLOPs.

        Args:
            effect: share, in (0, 1).

        Returns:
            Whether it is.
        """
        return self.width < -math.log1p(-effect)

    def seeds_to_resolve(self, effect: float) -> float:
        """Seeds of each point whose interval would be as narrow as a saving of a share of the FLOPs.

        Args:
            effect: share, in (0, 1).

        Returns:
            Number of seeds, as the width goes with the root of their number; infinite: unknown.
        """
        return self.seeds_per_point * (self.width / -math.log1p(-effect)) ** 2


def all_paired_ratios(
    fits: Sequence[tuple[Points, IsoflopFit]], replicates: int, rng: np.random.Generator
) -> list[PairedRatio]:
    """Paired ratios of all families that share runs.

    Args:
        fits: points and parabolas of each family.
        replicates: number of replicates, as many as those of the parabolas.
        rng: source of their noise.

    Returns:
        Ratios of each family to each one before it, as far as they share runs.
    """
    found = []
    for (reference, fit), (family, _) in combinations(fits, 2):
        found += paired_ratios(family, reference, fit, replicates, rng)
    return found


def paired_ratios(
    family: Points, reference: Points, reference_fit: IsoflopFit, replicates: int, rng: np.random.Generator
) -> list[PairedRatio]:
    """FLOPs ratio at each budget of two families, and over all budgets.

    A difference in loss is linear in ln N, with one slope for all budgets, and is taken at the reference's
    best size; how the reference's optimum loss falls with C says how many times the FLOPs make up for it.
    Runs whose seed is not known are in no pair.

    Args:
        family: trained models.
        reference: trained models of the other family.
        reference_fit: its parabolas.
        replicates: number of replicates, as many as those of the parabolas.
        rng: source of their noise.

    Returns:
        Ratios, smallest budget first, then that over all; empty where the reference has fewer than two usable
        budgets, or its usable budgets share too few runs with the family to judge their noise.
    """
    if len(reference_fit.usable) < 2:
        return []
    optima = {optimum.budget_flops: optimum for optimum in reference_fit.usable}
    shared = _differences(family, reference, set(optima))
    budgets = sorted({budget for budget, _, _ in shared})
    if not budgets or len(shared) - len(budgets) - 1 < 1:
        return []
    rows = [budgets.index(budget) for budget, _, _ in shared]
    log_n = np.array([size - math.log(optima[budget].parameters_S[0]) for budget, size, _ in shared])
    differences = np.array([difference for *_, difference in shared])
    # A column for each budget, whose coefficient is the difference at the best size, and the slope.
    design = np.column_stack([np.eye(len(budgets))[rows], log_n])
    inverse = np.linalg.pinv(design)
    freedom = len(differences) - int(np.linalg.matrix_rank(design))
    table_Sn = replicate(differences, design @ (inverse @ differences), freedom, replicates, rng)
    at_best_bS = (table_Sn @ inverse.T).T[: len(budgets)]
    losses_bS, slopes_bS = _optimum_losses(reference_fit.usable, np.log(budgets))
    # The reference's loss is L at C, and L + d at C / ratio; where it does not fall, no FLOPs make up for d.
    falling_bS = np.where(slopes_bS < 0, -slopes_bS, math.nan)
    log_ratios_bS = np.log1p(at_best_bS / losses_bS) / falling_bS
    counts = np.bincount(rows)
    sizes = np.array([len({size for place, size, _ in shared if place == budget}) for budget in budgets])

    def as_ratio(
        budget: float | None, pairs: int, points: int, difference_S: Floats, log_S: Floats
    ) -> PairedRatio:
        return PairedRatio(
            family=family.family,
            reference=reference.family,
            budget_flops=budget,
            num_pairs=pairs,
            seeds_per_point=pairs / points,
            nats_difference=estimate(difference_S),
            ratio=estimate(np.exp(log_S)),
        )

    found = [
        as_ratio(budget, int(counts[row]), int(sizes[row]), at_best_bS[row], log_ratios_bS[row])
        for row, budget in enumerate(budgets)
    ]
    all_budgets = as_ratio(
        None, len(shared), int(sizes.sum()), at_best_bS.mean(axis=0), log_ratios_bS.mean(axis=0)
    )
    return [*found, all_budgets]


def _optimum_losses(optima: Sequence[Optima], log_c: Floats) -> tuple[Floats, Floats]:
    """Optimum losses at budgets, and the slope of their logarithm in ln C, [budgets, 1 + replicates].

    A parabola in logarithms: the slope falls as losses come near the one that no model reaches. With fewer
    than four budgets a straight line.
    """
    own_log_c = np.log([each.budget_flops for each in optima])
    center, degree = own_log_c.mean(), 2 if len(optima) > 3 else 1
    with np.errstate(invalid="ignore"):
        logs_bS = np.log(np.stack([each.nats_per_token_S for each in optima]))
    coefficients_kS = np.linalg.pinv(np.vander(own_log_c - center, degree + 1)) @ logs_bS
    powers = np.vander(log_c - center, degree + 1)
    slopes = powers[:, 1:] * np.arange(degree, 0, -1)
    return np.exp(powers @ coefficients_kS), slopes @ coefficients_kS[:-1]


def _differences(family: Points, reference: Points, budgets: set[float]) -> list[tuple[float, float, float]]:
    """Budget, ln N and difference in loss of each pair of runs."""
    losses: dict[tuple[float, float, float], float] = {}
    for key, loss in zip(_keys(reference), reference.nats_per_token, strict=True):
        losses[key] = float(loss)
    return [
        (budget, math.log(parameters), float(loss) - losses[budget, parameters, seed])
        for (budget, parameters, seed), loss in zip(_keys(family), family.nats_per_token, strict=True)
        if budget in budgets and not math.isnan(seed) and (budget, parameters, seed) in losses
    ]


def _keys(points: Points) -> list[tuple[float, float, float]]:
    columns = (points.budget_flops, points.parameters, points.seeds)
    return [(float(c), float(n), float(seed)) for c, n, seed in zip(*columns, strict=True)]
