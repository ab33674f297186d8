"""`megatron-dlm scaling lr-sweep RECIPE ... --output GRID`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_dlm.cli.arguments import parse
from megatron_dlm.cli.scaling_fit import with_interval
from megatron_dlm.cli.scaling_grid import GridArguments
from megatron_dlm.cli.scaling_run import RunGridConfig, train_missing
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from megatron_dlm.scaling.lr_sweep import BestRates

PICTURE = "lr.png"


@dataclass(frozen=True, kw_only=True)
class SweepConfig(GridArguments):
    """Train sizes at several learning rates, and find the best rate of each.

    Plans the runs, trains those that are missing and draws the loss against the rate. The same command goes
    on with a sweep that was stopped.
    """

    budget: float
    """FLOPs of each run."""
    lrs: tuple[float, ...]
    """Peak learning rates, three at least; the lowest rate of a run keeps its share of the peak."""
    jobs: int = 1
    """Runs at a time."""
    replicates: int = 1000
    """Number of replicates for intervals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.lrs)) < 3 or not all(0 < rate < 1 for rate in self.lrs):
            raise InputError(f"lrs: {' '.join(map(str, self.lrs))} are not three different rates in (0, 1)")
        if self.jobs < 1:
            raise InputError(f"jobs: {self.jobs} is below 1")
        if self.replicates < 100:
            raise InputError(f"replicates: {self.replicates} is below 100")


def run(arguments: list[str]) -> int:
    """Parse, plan, train, draw; returns the exit code."""
    config = parse(SweepConfig, arguments, verb="scaling lr-sweep")
    from megatron_dlm.scaling.collect import read_results
    from megatron_dlm.scaling.grid_runs import Rules
    from megatron_dlm.scaling.lr_sweep import best_rates, plan_sweep
    from megatron_dlm.scaling.pictures import draw_rates
    from megatron_dlm.scaling.run_list import POINTS, RUN_LIST, read_run_list, write_run_list

    grid = plan_sweep(
        config.bases(),
        config.named_sizes(),
        config.budget,
        config.lrs,
        directory=config.output,
        rules=Rules(
            count=config.count,
            warmup_fraction=config.warmup_fraction,
            least_warmup_steps=config.least_warmup_steps,
        ),
    )
    if not (config.output / RUN_LIST).exists():
        write_run_list(grid, config.output)
    elif read_run_list(config.output) != grid:
        raise InputError(f"output: {config.output / RUN_LIST} is of another sweep; take another directory")
    if code := train_missing(RunGridConfig(grid=config.output, jobs=config.jobs)):
        return code
    found = best_rates(read_results(config.output / POINTS), replicates=config.replicates, seed=0)
    _print(found)
    draw_rates(found, config.output / PICTURE)
    print(config.output / PICTURE)
    return 0


def _print(found: list[BestRates]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("family", "N", "best rate", "nats/token", "", title="best learning rate by size")
    for family in found:
        for optimum in family.fit.optima:
            estimates = optimum.estimates()
            table.add_row(
                family.family,
                f"{optimum.budget_flops:,.0f}",
                with_interval(estimates["parameters"], ".3g"),
                with_interval(estimates["nats_per_token"], ".4f"),
                optimum.remark,
            )
        for remark in family.fit.left_out:
            print(f"note: {remark}", file=sys.stderr)
    Console(width=max(110, Console().width)).print(table)
    for family in found:
        if (exponent := family.exponent) is not None:
            print(f"{family.family}: the best rate goes with N to the power {with_interval(exponent, '.3f')}")
