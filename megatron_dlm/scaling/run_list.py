"""The list of a grid's runs, a JSON file that people may edit."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.codec import decode, encode
from megatron_dlm.platform.files import write_json

RUN_LIST, COMMANDS, TORCHRUN_LIST = "runs.json", "commands.txt", "torchrun.sh"
POINTS = "points.csv"
"""Results of a grid's runs; a run that is in it is done, also without its directory."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a grid."""

    name: str
    family: str
    """Name of the family, or of a variant of it, in tables and fits."""
    recipe: Path
    options: tuple[str, ...]
    """Further words of `megatron-dlm train RECIPE`."""
    directory: Path
    budget_flops: float
    parameters: int
    """Parameters by the paper's count: all but one V x d matrix."""
    tokens: int
    """Training tokens."""
    published_flops: float
    """FLOPs of the run as the paper counts them."""
    actual_flops: float
    """FLOPs of the run's matrix products, with attention; the head on rows with a loss."""
    seed: int
    after: str = ""
    """Name of the run whose checkpoint this one branches from; empty: it starts from scratch."""
    shared_flops: float = 0.0
    """The part of actual_flops that the run it branches from has made."""

    @property
    def own_flops(self) -> float:
        """FLOPs that the run itself makes."""
        return self.actual_flops - self.shared_flops

    @property
    def words(self) -> list[str]:
        """Arguments of `megatron-dlm train`."""
        return [str(self.recipe), *self.options, "--directory", str(self.directory)]


@dataclass(frozen=True, kw_only=True)
class RunList:
    """All runs of a grid, in the order in which they are started."""

    runs: tuple[PlannedRun, ...]

    def __post_init__(self) -> None:
        for what in ("name", "directory"):
            seen: dict[object, str] = {}
            for run in self.runs:
                value = getattr(run, what)
                if value in seen:
                    raise InputError(f"runs: {seen[value]} and {run.name} have the same {what}, {value}")
                seen[value] = run.name
        names: set[str] = set()
        for run in self.runs:
            if run.after and run.after not in names:
                raise InputError(f"runs: {run.name} comes after {run.after}, which is not before it")
            names.add(run.name)


def write_run_list(grid: RunList, directory: Path) -> None:
    """Write a grid's files: runs.json, commands.txt for job arrays, torchrun.sh.

    Args:
        grid: the runs.
        directory: of the grid; created if it is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    commands = [shlex.join(run.words) for run in grid.runs]
    (directory / COMMANDS).write_text("".join(f"{command}\n" for command in commands), encoding="utf-8")
    lines = ["#!/usr/bin/env bash", "# All runs of the grid one after another; a finished run ends at once."]
    lines += ["set -euo pipefail", *(f"examples/torchrun/train.sh {command}" for command in commands)]
    (directory / TORCHRUN_LIST).write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(directory / RUN_LIST, encode(grid))


def read_run_list(directory: Path) -> RunList:
    """The runs of a grid.

    Args:
        directory: of the grid, or its runs.json.

    Returns:
        The runs.

    Raises:
        InputError: there is no such file, it is not JSON, has wrong fields, or two runs share a directory.
    """
    path = directory if directory.suffix == ".json" else directory / RUN_LIST
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}; megatron-dlm scaling plan writes it") from error
    return decode(RunList, record, str(path))
