"""Why a layout is the fastest: what the best layout with another choice on each axis would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_dlm.planning.layouts import AXES
from megatron_dlm.planning.plan import Estimate
from megatron_dlm.planning.step_time import StepTime


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
