"""`megatron-dlm scaling collect GRID ... --output points.csv`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from megatron_dlm.cli.arguments import check_new_file, parse
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from megatron_dlm.scaling.collect import Problem


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Write the results of finished runs as one table.

    A row has the family, parameters by both counts, FLOPs by both counts, tokens, and the validation bound
    after the last step with its standard error. Runs that are unfinished or have diverged, that differ in
    data or validation, or repeat a point are listed and left out. Rows that the table has already stay.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Directories of grids (with runs.json), of runs, or of anything that holds runs. Runs of a grid that are
    not here any more are taken from its points.csv."""
    output: Path
    """CSV file; rows of the same runs are replaced, others stay."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("runs: name a directory")
        check_new_file("output", self.output)


def run(arguments: list[str]) -> int:
    """Parse, collect, write; returns the exit code: 1 if the table has no rows."""
    config = parse(CollectConfig, arguments, verb="scaling collect")
    from megatron_dlm.scaling.collect import add_results, collect, find_runs

    found = find_runs(config.runs)
    results, problems = collect(found)
    rows = add_results(config.output, results, problems)
    tell_problems(problems)
    print(f"{config.output}: {len(rows)} rows, {len(results)} of {len(found)} runs here")
    return 0 if rows else 1


def tell_problems(problems: Sequence[Problem]) -> None:
    """Name runs that are not in the table, with the reason.

    Args:
        problems: such runs.
    """
    for problem in problems:
        print(f"left out: {problem.run}: {problem.reason}", file=sys.stderr)
