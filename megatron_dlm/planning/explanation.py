"""Why a layout is the fastest: what the best layout with another choice on each axis would take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from megatron_dlm.planning.plan import Estimate
from megatron_dlm.planning.step_time import StepTime
from megatron_dlm.run.config import RunConfig

AXES: dict[str, Callable[[RunConfig], object]] = {
    "tensor parallel": lambda run: run.parallel.tensor_model_parallel_size,
    "pipeline parallel": lambda run: run.parallel.pipeline_model_parallel_size,
    "pipeline chunks": lambda run: run.parallel.virtual_pipeline_model_parallel_size,
    "context parallel": lambda run: run.parallel.context_parallel_size,
    "microbatch": lambda run: run.training.micro_batch_size,
    "recompute": lambda run: run.training.recompute,
    "sharding": lambda run: sharding_of(run),
    "precision": lambda run: run.training.precision,
}
"""What a layout chooses, by name."""


@dataclass(frozen=True)
class Alternative:
    """The fastest layout with another choice on one axis."""

    axis: str
    choice: object
    estimate: Estimate
    slowdown: float
    """Its time of a step over the chosen layout's."""
    grows: str
    """The part of a step that takes longer by most, or "nothing"."""
    by_seconds: float


def sharding_of(run: RunConfig) -> str:
    """What data parallel ranks share."""
    if run.parallel.fully_sharded:
        return "everything"
    return "optimizer" if run.parallel.use_distributed_optimizer else "nothing"


def alternatives(chosen: Estimate, fitting: Sequence[Estimate]) -> list[Alternative]:
    """For each axis the fastest layout for each other choice on it.

    Args:
        chosen: a layout.
        fitting: layouts that fit, fastest first.

    Returns:
        Alternatives by axis, fastest first; choices with which nothing fits are missing.
    """
    found = []
    for axis, choice_of in AXES.items():
        best: dict[object, Estimate] = {}
        for estimate in fitting:
            best.setdefault(choice_of(estimate.config), estimate)
        best.pop(choice_of(chosen.config), None)
        for choice, estimate in best.items():
            part, seconds = _largest_growth(chosen.time, estimate.time)
            slowdown = estimate.time.total / chosen.time.total
            found.append(Alternative(axis, choice, estimate, slowdown, part, seconds))
    return found


def _largest_growth(before: StepTime, after: StepTime) -> tuple[str, float]:
    growths = {
        field.name: getattr(after, field.name) - getattr(before, field.name) for field in fields(StepTime)
    }
    part = max(growths, key=lambda name: growths[name])
    return (part.replace("_", " "), growths[part]) if growths[part] > 0 else ("nothing", 0.0)
