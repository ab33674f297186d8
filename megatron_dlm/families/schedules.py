"""Fields of an objective that change during training: functions of the step alone, so a resume is exact."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.attention_mask import AttentionMask
from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.families.base import Objective, ObjectiveConfig
from megatron_dlm.interfaces import InputError, ModelInputs, RowTargets, Targets, TokenBatch, Vocabulary
from megatron_dlm.platform.vocab_parallel import VocabShard

Config = TypeVar("Config", bound=ObjectiveConfig)
CHECKED_STEPS = 100
"""How many steps between the first and the last point are tried before a run starts, besides the points."""


@dataclass(frozen=True)
class FieldSchedule:
    """Values of one field: linear between points if they are floats, else held until the next point."""

    field: str
    """Its name, with dots inside nested configurations."""
    steps: tuple[int, ...]
    """Rising; from the last one on the field has its own value."""
    values: tuple[Any, ...]
    """At each of the steps; the last one is the field's own value."""

    def at(self, step: int) -> Any:
        """The value after `step` optimizer steps."""
        if isinstance(self.values[-1], float):
            return float(np.interp(step, self.steps, self.values))
        return self.values[max(0, bisect_right(self.steps, step) - 1)]


@lru_cache(maxsize=16)
def field_schedules(config: ObjectiveConfig) -> tuple[FieldSchedule, ...]:
    """The schedules of an objective, read.

    Args:
        config: an objective with `schedules`.

    Returns:
        One for each field that changes.

    Raises:
        InputError: a schedule that cannot be read, or of a field that cannot change.
    """
    found = tuple(_read(text, config) for text in config.schedules)
    names = [schedule.field for schedule in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"objective.schedules: {name} has two schedules")
    return found


def _read(text: str, config: ObjectiveConfig) -> FieldSchedule:
    name, *points = text.split() or [""]
    if name not in config.can_change:
        offered = ", ".join(config.can_change) or "nothing"
        raise InputError(
            f"objective.schedules: {name!r} does not change during training; {config.name} changes {offered}"
        )
    words = [point.split(":") for point in points]
    if len(points) < 2 or any(len(word) != 2 for word in words[:-1]) or len(words[-1]) != 1:
        raise InputError(
            f"objective.schedules: {text!r} is not FIELD STEP:VALUE ... STEP; from the last step on it "
            "has its own value"
        )
    if not all(re.fullmatch(r"\d+", word[0]) for word in words):
        raise InputError(f"objective.schedules: {text!r}: a step is no whole number")
    steps = tuple(int(word[0]) for word in words)
    if any(after <= before for before, after in itertools.pairwise(steps)):
        raise InputError(f"objective.schedules: {text!r}: steps do not rise")
    declared = _type_of(config, name)
    choices = get_args(declared)
    try:
        kind = str if choices else declared
        values = tuple(kind(word[1]) for word in words[:-1])
    except ValueError as error:
        raise InputError(f"objective.schedules: {text!r}: {error}") from error
    choices = choices or values
    if not set(values) <= set(choices):
        raise InputError(f"objective.schedules: {text!r}: {name} is one of {', '.join(map(str, choices))}")
    return FieldSchedule(name, steps, (*values, kind(_get(config, name))))


def _get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _replaced(config: Any, values: Mapping[str, Any]) -> Any:
    """A configuration with other values by dotted name; fields that are checked together change together."""
    own = {name: value for name, value in values.items() if "." not in name}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        if rest:
            nested.setdefault(first, {})[rest] = value
    own |= {name: _replaced(getattr(config, name), inner) for name, inner in nested.items()}
    return replace(config, **own)


def _type_of(config: Any, name: str) -> Any:
    """The declared type of a field, by dotted name."""
    first, _, rest = name.partition(".")
    return _type_of(getattr(config, first), rest) if rest else get_type_hints(type(config))[first]


def objective_at(config: Config, step: int) -> Config:
    """The objective that a training step has.

    Args:
        config: the run's objective.
        step: optimizer steps done before.

    Returns:
        Without schedules; `config` itself if it has none.

    Raises:
        InputError: the values of this step are not allowed together.
    """
    if not config.schedules:
        return config
    values = {schedule.field: schedule.at(step) for schedule in field_schedules(config)}
    with naming_step(step):
        found: Config = _replaced(config, {"schedules": (), **values})
    return found


@contextmanager
def naming_step(step: int) -> Iterator[None]:
    """Say of what is refused at which step of the schedules it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"objective.schedules: at step {step}: {error}") from error


@lru_cache(maxsize=16)
def objective_phases(config: Config) -> Mapping[int, Config]:
    """Objectives that a run trains: at the points of its schedules, beside them, and at steps between.

    Args:
        config: the run's objective.

    Returns:
        Different ones by the step at which each was tried first; the last has the fields' own values.

    Raises:
        InputError: a schedule that cannot be read, or values that are not allowed.
    """
    points = {step for schedule in field_schedules(config) for step in schedule.steps}
    if not points:
        return {0: config}
    beside = {max(0, step + side) for step in points for side in (-1, 1)}
    between = np.linspace(0, max(points), CHECKED_STEPS).astype(int).tolist()
    phases: dict[int, Config] = {}
    for step in sorted({0, *points, *beside, *between}):
        if (phase := objective_at(config, step)) not in phases.values():
            phases[step] = phase
    return phases


def has_parts_at_times(config: ObjectiveConfig) -> bool:
    """Whether some step of a run trains an objective of two parts."""
    return any(phase.has_parts for phase in objective_phases(config).values())


def scheduled_values(config: ObjectiveConfig, step: int) -> dict[str, float]:
    """Values of the fields that change, as metrics.

    Args:
        config: the run's objective.
        step: optimizer steps done before.

    Returns:
        Numbers by field; a word is 1 under FIELD=WORD.
    """
    values = {schedule.field: schedule.at(step) for schedule in field_schedules(config)}
    return {
        f"{name}={value}" if isinstance(value, str) else name: 1.0 if isinstance(value, str) else float(value)
        for name, value in values.items()
    }


def training_objective(config: ObjectiveConfig, vocabulary: Vocabulary) -> Objective:
    """The objective that a run trains and is validated with.

    Args:
        config: the run's objective.
        vocabulary: token ids of the model.

    Returns:
        The family's own; with schedules, a range of training times or a lookahead, one that follows them.
    """
    if not config.schedules and config.training_times is None and config.training_lookahead == 1:
        return config.build(vocabulary)
    return ScheduledObjective(config, vocabulary)


def _seeing_ahead(inputs: ModelInputs, share: float) -> ModelInputs:
    """Inputs whose positions see those before them, themselves, and so many (a share of all) behind them."""
    length = inputs.token_ids_BL.shape[1]
    places = torch.arange(length, dtype=torch.int32)
    mask = AttentionMask.of(reach=places + round(share * length), order=places)
    return replace(inputs, attention_mask=mask)


class ScheduledObjective(Objective):
    """In training the objective of the step; in evaluation that of the fields' own values."""

    def __init__(self, config: ObjectiveConfig, vocabulary: Vocabulary) -> None:
        self._config, self._vocabulary = config, vocabulary
        self._own = replace(config, schedules=()).build(vocabulary)
        self._newest = config, self._own
        # Some values are checked with the vocabulary.
        for step, phase in objective_phases(config).items():
            with naming_step(step):
                phase.build(vocabulary)

    def _at(self, context: CorruptionContext) -> tuple[Objective, CorruptionContext]:
        if not context.training:
            return self._own, context
        config = objective_at(self._config, context.step)
        if self._newest[0] != config:
            self._newest = config, config.build(self._vocabulary)
        if config.training_times is not None:
            context = replace(context, time_range=config.training_times)
        return self._newest[1], context

    def split(self, batch: TokenBatch, context: CorruptionContext) -> list[TokenBatch]:
        """Split the microbatch as the step's objective does."""
        objective, context = self._at(context)
        return objective.split(batch, context)

    def corrupt(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Corrupt the microbatch as the step's objective does."""
        objective, context = self._at(context)
        inputs, targets = objective.corrupt(batch, context)
        lookahead = self._newest[0].training_lookahead if context.training else 1.0
        return (inputs if lookahead == 1 else _seeing_ahead(inputs, lookahead)), targets

    def token_losses(self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard) -> Tensor:
        """Row losses, which no schedule changes."""
        return self._own.token_losses(logits_RVp, targets, vocab)

    def loss_and_dlogits(
        self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """Row losses and gradients, which no schedule changes."""
        return self._own.loss_and_dlogits(logits_RVp, targets, vocab)
