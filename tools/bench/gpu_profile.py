"""Splits a step's time on the device by part and by kernel, and counts how often the CPU waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from tools.bench.kernel_names import LAUNCHES, OTHER, PARTS, WAITS, part_of

REGION = "bench: one step"
TOP = 15
NOTABLE = 0.03
"""Share of the device's time above which a kernel without a part is named."""


@dataclass
class _Sum:
    """Sum over events of equal names."""

    seconds: float = 0.0
    calls: int = 0


@dataclass(frozen=True)
class StepProfile:
    """Time and kernels of one step."""

    parts: dict[str, _Sum] = field(default_factory=dict)
    kernels: dict[tuple[str, str], _Sum] = field(default_factory=dict)
    """Kernels by name and part."""
    waits: dict[str, int] = field(default_factory=dict)
    """Calls in which the CPU waited."""
    launches: int = 0
    wall_seconds: float = 0.0

    def add(self, name: str, part: str, seconds: float) -> None:
        """Count one kernel or operator."""
        for sums in (self.parts.setdefault(part, _Sum()), self.kernels.setdefault((name, part), _Sum())):
            sums.seconds += seconds
            sums.calls += 1

    def as_line(self) -> dict[str, Any]:
        """What goes into the output: milliseconds, calls and counts."""
        total = sum(part.seconds for part in self.parts.values())
        ranked = sorted(self.kernels.items(), key=lambda item: -item[1].seconds)

        def rows(kernels: Iterable[tuple[tuple[str, str], _Sum]]) -> list[list[Any]]:
            return [
                [name[:110], part, round(spent.seconds * 1e3, 3), spent.calls]
                for (name, part), spent in kernels
            ]

        others = [item for item in ranked if item[0][1] == OTHER]
        return {
            "parts": {
                part: [round(self.parts[part].seconds * 1e3, 3), self.parts[part].calls]
                for part in PARTS
                if part in self.parts
            },
            "top": rows(ranked[:TOP]),
            "other": rows(others[:TOP]),
            "other_above_3_percent": sum(item[1].seconds > NOTABLE * total for item in others),
            "waits": self.waits,
            "launches": self.launches,
            "device_ms": round(total * 1e3, 3),
            "profiled_ms": round(self.wall_seconds * 1e3, 3),
        }


def profile_step(step: Callable[[int], Any], device: torch.device) -> StepProfile:
    """Run one step under the profiler.

    Args:
        step: warm.
        device: whose time is counted; on a CPU that of its operators.

    Returns:
        The profile.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        with record_function(REGION):
            step(0)
        if on_gpu:
            torch.cuda.synchronize()
    return profile_of(recorded.events(), on_gpu=on_gpu)


def profile_of(events: Iterable[Any], *, on_gpu: bool) -> StepProfile:
    """Sort a profiler's events.

    Args:
        events: of `torch.profiler.profile`, of a step inside a region named `REGION`.
        on_gpu: whether kernels of a GPU are counted, not operators of the CPU.

    Returns:
        The profile.
    """
    events = list(events)
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    region = next(event for event in on_cpu if event.name == REGION)
    waits: dict[str, int] = {}
    launches = 0
    for event in on_cpu:
        # The profiler itself waits at its end.
        inside = region.time_range.start <= event.time_range.start <= region.time_range.end
        if inside and WAITS.search(event.name):
            waits[event.name] = waits.get(event.name, 0) + 1
        launches += bool(inside and LAUNCHES.search(event.name))
    elapsed = region.time_range.end - region.time_range.start
    found = StepProfile(waits=waits, launches=launches, wall_seconds=elapsed / 1e6)
    if on_gpu:
        launchers = _launchers(on_cpu)
        for event in events:
            if event.device_type != DeviceType.CPU and not event.is_user_annotation:
                spent = event.time_range.end - event.time_range.start
                alike = launchers.get((event.name, spent))
                callers = _callers(alike.pop()) if alike else []
                found.add(event.name, part_of(event.name, callers), spent / 1e6)
    else:
        for event in on_cpu:
            if event.name != REGION:
                part = part_of(event.name, _callers(event))
                found.add(event.name, part, event.self_cpu_time_total / 1e6)
    return found


def _launchers(on_cpu: Iterable[Any]) -> dict[tuple[str, float], list[Any]]:
    """Operators that launched kernels, by the kernel's name and microseconds.

    Before torch 2.13 events of kernels do not say who launched them; those of operators do.
    """
    found: dict[tuple[str, float], list[Any]] = {}
    for operator in on_cpu:
        for kernel in operator.kernels:
            found.setdefault((kernel.name, kernel.duration), []).append(operator)
    return found


def _callers(event: Any) -> list[str]:
    """Names of an operator and of those around it, innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names
