"""A grid of runs: families times sizes times budgets, from scratch or as branches of the longest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_dlm.interfaces import InputError
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.lr_schedule import LrScheduleConfig
from megatron_dlm.scaling.grid_runs import Base, Rules, as_run, configured
from megatron_dlm.scaling.grid_sizes import Size
from megatron_dlm.scaling.guess import Guess
from megatron_dlm.scaling.run_list import PlannedRun, RunList

LEAST_ON_A_SIDE = 2
"""Sizes that a parabola needs below the guess, and above it."""


def plan_grid(
    bases: Sequence[Base],
    sizes: Sequence[Size],
    budgets: Sequence[float],
    seeds: Sequence[int],
    *,
    directory: Path,
    guess: Guess,
    sizes_per_budget: int | None,
    rules: Rules,
) -> RunList:
    """All runs of a grid: cheapest budget first, or with branches size by size.

    Args:
        bases: families.
        sizes: sizes to choose from.
        budgets: FLOPs of a run.
        seeds: random seeds; each run is there once for each.
        directory: of the grid, in which each run has one.
        guess: best size at a budget.
        sizes_per_budget: number of sizes at a budget, those nearest to the guess; None: all.
        rules: steps, batch and learning rate.

    Returns:
        The runs.

    Raises:
        InputError: a budget has fewer than two sizes on a side of its guess, does not pay for a run, or a run
            cannot be.
    """
    chosen = [
        (budget, base, size, seed)
        for budget in sorted(budgets)
        for base in bases
        for size in sizes_at(base, sizes, budget, guess(base.name, budget), sizes_per_budget)
        for seed in seeds
    ]
    place = directory / "runs"
    if rules.wsd_decay_fraction is None:
        runs = [_planned(*each, place, rules, min(budgets)) for each in chosen]
        return RunList(runs=tuple(runs))
    trunks: dict[tuple[str, str, int], list[float]] = {}
    by_name = {base.name: base for base in bases}
    by_size = {size.name: size for size in sizes}
    for budget, base, size, seed in chosen:
        trunks.setdefault((base.name, size.name, seed), []).append(budget)
    runs = []
    for (name, size_name, seed), its_budgets in trunks.items():
        base, size = by_name[name], by_size[size_name]
        runs += _branched(base, size, its_budgets, seed, place, rules, rules.wsd_decay_fraction)
    return RunList(runs=tuple(runs))


def sizes_at(base: Base, sizes: Sequence[Size], budget: float, guess: float, count: int | None) -> list[Size]:
    """The sizes of a family at a budget, smallest first.

    Args:
        base: the family.
        sizes: sizes to choose from.
        budget: FLOPs.
        guess: expected best number of parameters.
        count: number of sizes in a row that are taken, so that the farthest is as near to the guess by its
            ratio as it can be; 1: the nearest alone, for more seeds of an optimum; None: all.

    Returns:
        The sizes.

    Raises:
        InputError: fewer than two of them are below or above the guess.
    """
    by_size = sorted(sizes, key=base.parameters)
    fewest = 0 if count == 1 else LEAST_ON_A_SIDE
    count = len(by_size) if count is None else min(count, len(by_size))
    below = sum(base.parameters(size) < guess for size in by_size)
    starts = range(max(0, below + fewest - count), min(below - fewest, len(by_size) - count) + 1)
    rows = [by_size[start : start + count] for start in starts]
    if not rows:
        raise InputError(
            f"sizes: {base.name} at {budget:g} FLOPs has {below} sizes below the guess of {guess:.3g} "
            f"parameters and {len(by_size) - below} above; of {count}, a parabola needs {LEAST_ON_A_SIDE} on "
            f"each side. "
            f"The sizes: {', '.join(f'{size.name} ({base.parameters(size):,})' for size in by_size)}"
        )
    return min(rows, key=lambda row: max(abs(math.log(base.parameters(size) / guess)) for size in row))


def _planned(
    budget: float, base: Base, size: Size, seed: int, directory: Path, rules: Rules, least_budget: float
) -> PlannedRun:
    """A run from scratch with the recipe's schedule."""
    return as_run(base, size, budget, configured(base, size, budget, seed, rules, least_budget), directory)


def _branched(
    base: Base,
    size: Size,
    budgets: Sequence[float],
    seed: int,
    directory: Path,
    rules: Rules,
    decay_fraction: float,
) -> list[PlannedRun]:
    """One run to the largest budget, and from it a branch for each other budget, longest first."""
    configs = [configured(base, size, budget, seed, rules, min(budgets)) for budget in budgets]
    trunk_config, branch_configs = configs[-1], configs[:-1]
    # A branch goes on with the trunk's warm-up.
    warmup = trunk_config.schedule.warmup_steps
    ends = [config.training.num_steps for config in branch_configs]
    decays = [max(1, int(end * decay_fraction)) for end in ends]
    starts = [end - decay for end, decay in zip(ends, decays, strict=True)]
    if starts and min(starts) < warmup:
        raise InputError(
            f"{base.name}, {size.name}: a branch at step {min(starts)} lies in the warm-up of {warmup} steps"
        )
    last = trunk_config.training.num_steps
    trunk = as_run(
        base,
        size,
        budgets[-1],
        replace(
            trunk_config,
            schedule=_wsd(trunk_config, warmup, last, max(1, int(last * decay_fraction))),
            checkpoint=replace(trunk_config.checkpoint, save_at=tuple(sorted(starts))),
        ),
        directory,
    )
    runs = [trunk]
    for budget, config, start, decay in zip(budgets, branch_configs, starts, decays, strict=False):
        end = config.training.num_steps
        branch = replace(
            config,
            schedule=_wsd(config, warmup, end, decay),
            checkpoint=replace(config.checkpoint, branch_from=Path(f"{trunk.directory}@{start}")),
        )
        planned = as_run(base, size, budget, branch, directory)
        shared = planned.actual_flops * start / end
        runs.append(replace(planned, after=trunk.name, shared_flops=shared))
    return runs


def _wsd(config: RunConfig, warmup: int, end: int, decay: int) -> LrScheduleConfig:
    return replace(config.schedule, shape="wsd", warmup_steps=warmup, decay_steps=end, wsd_decay_steps=decay)
