"""A sweep over learning rates, and the best rate of each size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_dlm.scaling.collect import Result
from megatron_dlm.scaling.estimates import Estimate
from megatron_dlm.scaling.grid_runs import Base, Rules, as_run, configured
from megatron_dlm.scaling.grid_sizes import Size
from megatron_dlm.scaling.isoflop import IsoflopFit, fit_isoflop, fit_power_law
from megatron_dlm.scaling.points import Points
from megatron_dlm.scaling.run_list import RunList


def plan_sweep(
    bases: Sequence[Base],
    sizes: Sequence[Size],
    budget: float,
    rates: Sequence[float],
    *,
    directory: Path,
    rules: Rules,
) -> RunList:
    """A run for each size and learning rate; the lowest rate keeps its share of the highest.

    Args:
        bases: families.
        sizes: sizes.
        budget: FLOPs of each run.
        rates: learning rates.
        directory: of the sweep, in which each run has one.
        rules: steps and warm-up.

    Returns:
        The runs.

    Raises:
        InputError: the budget does not pay for a run.
    """
    runs = []
    for base in bases:
        share = base.config.schedule.min_lr / base.config.schedule.lr
        for size in sizes:
            config = configured(base, size, budget, base.config.training.seed, rules, budget)
            for rate in rates:
                schedule = replace(config.schedule, lr=rate, min_lr=rate * share)
                swept = replace(config, schedule=schedule)
                runs.append(as_run(base, size, budget, swept, directory / "runs", variant=f"-lr{rate:g}"))
    return RunList(runs=tuple(runs))


@dataclass(frozen=True)
class BestRates:
    """The best learning rate of each size of a family."""

    family: str
    fit: IsoflopFit
    """Parabolas of the loss in the logarithm of the rate: sizes are in the place of budgets, rates in that of
    sizes."""

    @property
    def exponent(self) -> Estimate | None:
        """Power of N with which the best rate goes; None with fewer than two sizes whose best is known."""
        if len(self.fit.usable) < 2:
            return None
        return fit_power_law("parameters", self.fit.usable).estimates()["exponent"]


def best_rates(results: Sequence[Result], *, replicates: int, seed: int) -> list[BestRates]:
    """Fit the results of a sweep.

    Args:
        results: of its runs.
        replicates: number of replicates for intervals.
        seed: random seed of their noise.

    Returns:
        Best rates of each family, in the order of the results.
    """
    found = []
    for family in dict.fromkeys(result.family for result in results):
        own = [result for result in results if result.family == family]
        tokens = np.array([float(result.tokens) for result in own])
        points = Points(
            family=family,
            rows=tuple(range(1, len(own) + 1)),
            budget_flops=np.array([float(result.parameters) for result in own]),
            parameters=np.array([result.lr for result in own]),
            tokens=tokens,
            nats_per_token=np.array([result.nats_per_token for result in own]),
            unique_tokens=tokens,
            seeds=np.array([float(result.seed) for result in own]),
        )
        found.append(BestRates(family, fit_isoflop(points, replicates, np.random.default_rng(seed))))
    return found
