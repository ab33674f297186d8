"""A grid of runs: families times sizes times budgets, each run with its steps, batch and learning rate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from megatron_dlm.interfaces import InputError
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.flops.flops_paper import (
    TRAINING_PASSES,
    max_steps,
    published_forward_flops,
    published_non_embedding_parameters,
)
from megatron_dlm.models.sizes import paper_model
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.description import options_between
from megatron_dlm.run.forward_passes import SampledPasses, sampled_passes
from megatron_dlm.run.lr_schedule import LrScheduleConfig
from megatron_dlm.scaling.guess import Guess
from megatron_dlm.scaling.run_list import PlannedRun, RunList

Count = Literal["published", "actual"]
LEAST_ON_A_SIDE = 2
"""Sizes that a parabola needs below the guess, and above it."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a run of a grid differs from its recipe."""

    count: Count = "published"
    """Which FLOPs a budget counts."""
    warmup_fraction: float = 0.01
    """Share of the steps."""
    least_warmup_steps: int = 100
    wsd_decay_fraction: float | None = None
    """Share of a run's steps in which its rate decays; runs of one size branch from the longest. None: each
    run has the recipe's schedule to itself."""
    lr_exponent: float = 0.0
    """Learning rates are the recipe's times (N / N of the recipe) to this power."""
    batch_exponent: float = 0.0
    """Batches are the recipe's times (C / smallest C) to this power, in whole microbatches."""


@dataclass(frozen=True)
class Base:
    """A family of the grid, or a variant of one."""

    name: str
    recipe: Path
    config: RunConfig
    vocabulary_size: int

    @cached_property
    def passes(self) -> SampledPasses:
        """Forward passes of the first batch, which are the same for each size."""
        return sampled_passes(self.config, self.vocabulary_size)

    def sample_flops(self, model: ModelConfig) -> tuple[float, float]:
        """Training FLOPs of one sample.

        Args:
            model: a size.

        Returns:
            As the paper counts them, and of the actual matrix products.
        """
        forward = published_forward_flops(model, self.vocabulary_size, self.config.data.seq_length)
        return float(TRAINING_PASSES * forward), self.passes.training_flops(model, self.vocabulary_size)


@dataclass(frozen=True)
class Size:
    """A size of the grid; the MLP is four times as wide as the hidden state."""

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int

    def model(self, base: ModelConfig) -> ModelConfig:
        """The size with the recipe's conditioning."""
        return replace(
            base,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            ffn_hidden_size=4 * self.hidden_size,
        )


def size_named(name: str) -> Size:
    """A size from its name.

    Args:
        name: a published size such as 113M, or LAYERSxHIDDENxHEADS such as 4x128x2.

    Returns:
        The size.

    Raises:
        InputError: neither.
    """
    if found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", name):
        return Size(name, *map(int, found.groups()))
    try:
        model = paper_model(name)
    except InputError as error:
        raise InputError(f"sizes: {name!r} is neither LAYERSxHIDDENxHEADS nor a published size") from error
    return Size(name, model.num_layers, model.hidden_size, model.num_attention_heads)


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


def parameters_of(base: Base, size: Size) -> int:
    """N as the paper counts it."""
    return published_non_embedding_parameters(size.model(base.config.model), base.vocabulary_size)


def sizes_at(base: Base, sizes: Sequence[Size], budget: float, guess: float, count: int | None) -> list[Size]:
    """The sizes of a family at a budget, smallest first.

    Args:
        base: the family.
        sizes: sizes to choose from.
        budget: FLOPs.
        guess: expected best number of parameters.
        count: sizes nearest to the guess that are taken, as many below as above where there are; None: all.

    Returns:
        The sizes.

    Raises:
        InputError: fewer than two of them are below or above the guess.
    """
    by_size = sorted(sizes, key=lambda size: parameters_of(base, size))
    below = [size for size in by_size if parameters_of(base, size) < guess]
    above = [size for size in by_size if parameters_of(base, size) >= guess]
    if count is not None:
        low = min(len(below), max(count // 2, count - len(above)))
        below = below[len(below) - low :]
        above = above[: count - low]
    if min(len(below), len(above)) < LEAST_ON_A_SIDE:
        raise InputError(
            f"sizes: {base.name} at {budget:g} FLOPs has {len(below)} sizes below the guess of {guess:.3g} "
            f"parameters and {len(above)} above; a parabola needs {LEAST_ON_A_SIDE} on each side. "
            f"The sizes: {', '.join(f'{size.name} ({parameters_of(base, size):,})' for size in by_size)}"
        )
    return [*below, *above]


def _planned(
    budget: float, base: Base, size: Size, seed: int, directory: Path, rules: Rules, least_budget: float
) -> PlannedRun:
    """A run from scratch with the recipe's schedule."""
    return as_run(base, size, budget, configured(base, size, budget, seed, rules, least_budget), directory)


def configured(
    base: Base, size: Size, budget: float, seed: int, rules: Rules, least_budget: float
) -> RunConfig:
    """The recipe at a size, with the steps, batch, learning rate and warm-up of a budget.

    Args:
        base: family.
        size: size of the model.
        budget: FLOPs of the run.
        seed: random seed.
        rules: steps, batch and learning rate.
        least_budget: smallest budget of the grid, which has the recipe's batch.

    Returns:
        The run, in the recipe's directory.

    Raises:
        InputError: the budget does not pay for more steps than the warm-up has.
    """
    name = f"{base.name} {size.name} at {budget:g} FLOPs"
    recipe, model = base.config, size.model(base.config.model)
    training = recipe.training
    if training.ramp_start:
        raise InputError(f"{base.recipe}: training.ramp_start: a run of a grid has batches of one size")
    batch = training.global_batch_size
    if rules.batch_exponent:
        grown = batch * (budget / least_budget) ** rules.batch_exponent
        batch = max(1, round(grown / training.micro_batch_size)) * training.micro_batch_size
    factor = 1.0
    if rules.lr_exponent:
        own = published_non_embedding_parameters(recipe.model, base.vocabulary_size)
        factor = (parameters_of(base, size) / own) ** rules.lr_exponent
    published, actual = base.sample_flops(model)
    try:
        if rules.count == "published":
            steps = max_steps(budget, published / TRAINING_PASSES, batch)
        else:
            steps = int(budget / (actual * batch))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    warmup = max(int(steps * rules.warmup_fraction), rules.least_warmup_steps)
    if steps <= warmup:
        raise InputError(
            f"{name}: budgets: {budget:g} FLOPs pay for {steps} steps, not more than the warm-up's {warmup}"
        )
    return replace(
        recipe,
        model=model,
        training=replace(training, global_batch_size=batch, seed=seed, num_steps=steps),
        schedule=replace(
            recipe.schedule,
            lr=recipe.schedule.lr * factor,
            min_lr=recipe.schedule.min_lr * factor,
            warmup_steps=warmup,
            decay_steps=steps,
        ),
    )


def as_run(
    base: Base, size: Size, budget: float, config: RunConfig, directory: Path, *, variant: str = ""
) -> PlannedRun:
    """A configured run as one of a list.

    Args:
        base: family.
        size: size of the model.
        budget: FLOPs that the run was configured for.
        config: the run.
        directory: in which it has its own.
        variant: what tells it from others of its family, budget, size and seed.

    Returns:
        The run.
    """
    seed, samples = config.training.seed, config.training.num_steps * config.training.global_batch_size
    name = f"{base.name}-{budget:.3g}-{size.name}{variant}-seed{seed}".replace("+", "")
    published, actual = base.sample_flops(config.model)
    options = options_between(base.config, config).items()
    return PlannedRun(
        name=name,
        family=base.name,
        recipe=base.recipe,
        options=tuple(word for option, values in options for word in (option, *values)),
        directory=directory / name,
        budget_flops=budget,
        parameters=parameters_of(base, size),
        tokens=samples * config.data.seq_length,
        published_flops=published * samples,
        actual_flops=actual * samples,
        seed=seed,
    )
