"""One run of a grid: a recipe at a size, with the steps, batch and learning rate of a budget."""

from __future__ import annotations

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
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.description import options_between
from megatron_dlm.run.forward_passes import SampledPasses, sampled_passes
from megatron_dlm.scaling.grid_sizes import Size
from megatron_dlm.scaling.run_list import PlannedRun

Count = Literal["published", "actual"]


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

    def parameters(self, size: Size) -> int:
        """N of a size as the paper counts it."""
        return published_non_embedding_parameters(size.model(self.config.model), self.vocabulary_size)

    def sample_flops(self, model: ModelConfig) -> tuple[float, float]:
        """Training FLOPs of one sample.

        Args:
            model: a size.

        Returns:
            As the paper counts them, and of the actual matrix products.
        """
        forward = published_forward_flops(model, self.vocabulary_size, self.config.data.seq_length)
        return float(TRAINING_PASSES * forward), self.passes.training_flops(model, self.vocabulary_size)


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
        factor = (base.parameters(size) / own) ** rules.lr_exponent
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
        parameters=base.parameters(size),
        tokens=samples * config.data.seq_length,
        published_flops=published * samples,
        actual_flops=actual * samples,
        seed=seed,
    )
