"""Runs as curves and a table in the terminal, from their metrics.jsonl."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from megatron_dlm.telemetry.writers import duration, read_metrics

COLORS = ("blue", "orange", "green", "magenta", "cyan", "red")
STALE_STEPS = 20
"""A run whose last line is older than this many steps, and a minute, is called silent."""


@dataclass(frozen=True)
class WatchedRun:
    """What is on disk of a run."""

    directory: Path
    num_steps: int | None
    entries: list[dict[str, Any]]

    @classmethod
    def read(cls, directory: Path, num_steps: int | None) -> WatchedRun:
        """Read the metrics of a run's directory, which may have none yet."""
        return cls(directory, num_steps, read_metrics(directory))

    def points(self, kind: str, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric."""
        found = [(e["step"], e[metric]) for e in self.entries if e["kind"] == kind and metric in e]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, kind: str) -> dict[str, Any]:
        """The last line of a kind; empty if there is none."""
        return next((entry for entry in reversed(self.entries) if entry["kind"] == kind), {})

    @property
    def has_ended(self) -> bool:
        """Whether the run has reached its last step."""
        return self.num_steps is not None and self.last("train").get("step", 0) >= self.num_steps

    def state(self, now: float) -> str:
        """Finished, waiting for its first line, silent since some time, or the time that is left."""
        last = self.last("train")
        if self.has_ended:
            return "finished"
        if not last:
            return "no steps yet"
        age = now - last["time"] if "time" in last else 0.0
        if age > max(60.0, STALE_STEPS * last.get("step_seconds_median", 0.0)):
            return f"silent for {duration(age)}"
        return f"ETA {duration(last['eta_seconds'])}"


def picture_of(runs: Sequence[WatchedRun], metric: str, width: int, height: int) -> Group:
    """Curves of a metric and a table of the runs.

    Args:
        runs: runs to show.
        metric: of training lines, for example nats_per_token; validation is drawn as dots where it has it.
        width: columns.
        height: rows of the curves.

    Returns:
        Something that rich prints.
    """
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(width, height)
    has_points, names = False, _names(runs)
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        color = COLORS[index % len(COLORS)]
        for kind, marker in (("train", "braille"), ("validation", "o")):
            steps, values = run.points(kind, metric)
            has_points = has_points or bool(steps)
            if steps and kind == "train":
                plotext.plot(steps, values, marker=marker, color=color, label=name)
            elif steps:
                plotext.scatter(steps, values, marker=marker, color=color)
    plotext.title(metric)
    plotext.xlabel("step")
    curves = Text.from_ansi(plotext.build()) if has_points else Text("no metrics yet")
    return Group(curves, _table(runs, names))


def _names(runs: Sequence[WatchedRun]) -> list[str]:
    """What tells the runs from each other: their paths behind the last directory that all are in."""
    paths = [os.path.abspath(run.directory) for run in runs]
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, shared) for path in paths]


def _table(runs: Sequence[WatchedRun], names: Sequence[str]) -> Table:
    columns = ("step", "nats/token", "validation", "tokens/s", "ms/step, p95", "MFU", "GiB")
    table, now = Table(Column("run", overflow="fold"), *columns, Column("", no_wrap=True)), time.time()
    for run, name in zip(runs, names, strict=True):
        last, validation = run.last("train"), run.last("validation")

        def shown(metric: str, style: str, scale: float = 1.0, line: dict[str, Any] = last) -> str:
            return format(scale * line[metric], style) if metric in line else "-"

        table.add_row(
            name,
            f"{last.get('step', 0):,} of {'?' if run.num_steps is None else format(run.num_steps, ',')}",
            shown("nats_per_token", ".4f"),
            shown("nats_per_token", ".4f", line=validation),
            shown("tokens_per_second", ",.0f"),
            f"{shown('step_seconds_median', ',.0f', 1e3)}, {shown('step_seconds_p95', ',.0f', 1e3)}",
            shown("mfu", ".0%"),
            shown("memory_gib", ".2f"),
            run.state(now),
        )
    return table
