"""`megatron-dlm scaling plan RECIPE ... --output GRID`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.cli.arguments import parse
from megatron_dlm.cli.plan import DEFAULT_GPU
from megatron_dlm.cli.scaling_grid import GridArguments, check_once
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from megatron_dlm.scaling.guess import Guess
    from megatron_dlm.scaling.run_list import PlannedRun


@dataclass(frozen=True, kw_only=True)
class PlanConfig(GridArguments):
    """Plan a grid of runs: families x sizes x budgets.

    Writes runs.json, which people may edit and `megatron-dlm scaling run` starts; commands.txt for
    examples/slurm/array.sh; and torchrun.sh, all runs one after another. Nothing is started.
    """

    budgets: tuple[float, ...]
    """FLOPs of a run, for example 6e18 1e19 3e19."""
    sizes_per_budget: int | None = None
    """Number of sizes at each budget, those nearest to the guess of the best one; 1: the nearest alone, for
    more seeds of the optima of a fit; None: all."""
    seeds: tuple[int, ...] = (1,)
    """Random seeds; each run is there once for each."""
    guess: Path | None = None
    """fit.json whose laws guess the best size at a budget; None: the published points' laws."""
    guess_factor: float = 1.0
    """Factor of the guess, for example 0.5 for text whose best models are smaller."""
    wsd_decay_fraction: float | None = None
    """Train each size once, with a constant learning rate, and branch off a run for each smaller budget whose
    rate decays over this share of its steps, for example 0.2; None: a run from scratch with the recipe's
    schedule for each."""
    lr_exponent: float = 0.0
    """Learning rates are the recipe's times (N / N of the recipe) to this power; 0: all alike, as in the
    paper."""
    batch_exponent: float = 0.0
    """Batches are the recipe's times (C / smallest C) to this power, in whole microbatches; 0: all alike, as
    in the paper."""
    mfu: float | None = None
    """Share of the GPU's bf16 speed that the runs are expected to reach, for hours: 0.4 is 40%."""
    gpu: str = DEFAULT_GPU
    """GPU of the hours: a100, a100-40gb, l40s, h100, h200, b200 or gb200."""
    measured: Path | None = None
    """Directory of a run whose measured FLOP/s a device the hours are for, in place of mfu."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("budgets", "seeds"):
            check_once(name, getattr(self, name))
        if not all(0 < budget < float("inf") for budget in self.budgets):
            raise InputError(f"budgets: {' '.join(map(str, self.budgets))} are not all above 0")
        if self.sizes_per_budget is not None and self.sizes_per_budget < 1:
            raise InputError(f"sizes_per_budget: {self.sizes_per_budget} is below 1")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise InputError(f"mfu: {self.mfu} is outside (0, 1]")
        if not self.guess_factor > 0:
            raise InputError(f"guess_factor: {self.guess_factor} is not above 0")
        if self.wsd_decay_fraction is not None and not 0 < self.wsd_decay_fraction < 1:
            raise InputError(f"wsd_decay_fraction: {self.wsd_decay_fraction} is outside (0, 1)")
        if self.wsd_decay_fraction is not None and self.batch_exponent:
            raise InputError("batch_exponent: runs that branch from one have its batch")


def run(arguments: list[str]) -> int:
    """Parse, plan, write, print; returns the exit code."""
    config = parse(PlanConfig, arguments, verb="scaling plan")
    from megatron_dlm.scaling.grid import plan_grid
    from megatron_dlm.scaling.grid_runs import Rules
    from megatron_dlm.scaling.run_list import COMMANDS, RUN_LIST, TORCHRUN_LIST, write_run_list

    if (config.output / RUN_LIST).exists():
        raise InputError(f"output: {config.output / RUN_LIST} exists already")
    speed = _device_flops_per_second(config)
    guess = _guess(config)
    grid = plan_grid(
        config.bases(),
        config.named_sizes(),
        config.budgets,
        config.seeds,
        directory=config.output,
        guess=lambda family, budget: config.guess_factor * guess(family, budget),
        sizes_per_budget=config.sizes_per_budget,
        rules=Rules(
            count=config.count,
            warmup_fraction=config.warmup_fraction,
            least_warmup_steps=config.least_warmup_steps,
            wsd_decay_fraction=config.wsd_decay_fraction,
            lr_exponent=config.lr_exponent,
            batch_exponent=config.batch_exponent,
        ),
    )
    write_run_list(grid, config.output)
    _print(config, grid.runs, speed)
    print(f"{config.output}: {RUN_LIST}, {COMMANDS}, {TORCHRUN_LIST}")
    return 0


def _guess(config: PlanConfig) -> Guess:
    from megatron_dlm.scaling.guess import guess_of_fit, published_guess

    return published_guess() if config.guess is None else guess_of_fit(config.guess)


def _device_flops_per_second(config: PlanConfig) -> float | None:
    """FLOP/s of a device that hours are computed with; None: nothing was said of it."""
    from megatron_dlm.planning.gpus import gpu_named
    from megatron_dlm.telemetry.writers import read_metrics

    if config.measured is not None:
        measured = [
            entry["tflops_per_second_per_device"]
            for entry in read_metrics(config.measured)
            if entry["kind"] == "train"
        ]
        if not measured:
            raise InputError(f"measured: {config.measured} has no metrics of training steps")
        return float(sorted(measured)[len(measured) // 2]) * 1e12
    gpu = gpu_named(config.gpu)
    return None if config.mfu is None else config.mfu * gpu.bf16_tflops * 1e12


def _print(config: PlanConfig, runs: tuple[PlannedRun, ...], speed: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        *("family", "FLOPs", "runs", "N", "tokens of a run", "FLOPs of all"),
        *(("device hours",) if speed else ()),
        title=f"{len(runs)} runs; a budget counts {config.count} FLOPs",
    )

    def add(family: str, budget: str, part: list[PlannedRun]) -> None:
        sizes, tokens = sorted({run.parameters for run in part}), [run.tokens for run in part]
        flops = sum(run.own_flops for run in part)
        cells = [family, budget, str(len(part)), f"{sizes[0]:,} to {sizes[-1]:,}"]
        cells += [f"{min(tokens):,} to {max(tokens):,}", f"{flops:.3g}"]
        table.add_row(*cells, *((f"{flops / speed / 3600:,.2f}",) if speed else ()))

    for key in dict.fromkeys((run.family, run.budget_flops) for run in runs):
        add(key[0], f"{key[1]:g}", [run for run in runs if (run.family, run.budget_flops) == key])
    Console(width=max(110, Console().width)).print(table)
    own_shares = [run.own_flops / run.actual_flops for run in runs]
    published = sum(share * run.published_flops for share, run in zip(own_shares, runs, strict=True))
    tokens = sum(share * run.tokens for share, run in zip(own_shares, runs, strict=True))
    actual = sum(run.own_flops for run in runs)
    print(
        f"all: {tokens:,.0f} tokens; {published:.4g} FLOPs as the paper counts them, "
        f"{actual:.4g} of matrix products"
    )
    if speed:
        of_what = f"{config.measured}" if config.measured else f"{config.mfu:.0%} of {config.gpu}"
        print(f"     {actual / speed / 3600:,.2f} device hours at {speed / 1e12:.4g} TFLOP/s, {of_what}")
