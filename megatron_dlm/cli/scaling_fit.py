"""`megatron-dlm scaling fit TABLE.csv`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from megatron_dlm.cli.arguments import check_new_file, parse
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_dlm.scaling.estimates import Estimate
    from megatron_dlm.scaling.fit import ScalingFit


PUBLISHED_TABLE = "published"


@dataclass(frozen=True, kw_only=True)
class FitArguments:
    """A table and how it is fitted."""

    table: Annotated[Path, tyro.conf.Positional]
    """CSV file of `megatron-dlm scaling collect`, or with columns family, budget_flops, parameters, tokens
    and nats_per_token; `published`: the points of arXiv:2602.15014."""
    reference: str | None = None
    """Family that the others are compared with; None: the first of the table."""
    replicates: int = 1000
    """Number of replicates for intervals."""
    seed: int = 0
    """Random seed of the replicates."""
    effect: float = 0.1
    """Share of the FLOPs that runs in pairs should tell; where their interval is wider, the number of seeds
    that it would take is printed."""

    def __post_init__(self) -> None:
        if self.replicates < 100:
            raise InputError(f"replicates: {self.replicates} is below 100")
        if not 0 < self.effect < 1:
            raise InputError(f"effect: {self.effect} is outside (0, 1)")


@dataclass(frozen=True, kw_only=True)
class FitConfig(FitArguments):
    """Scaling laws of a table of trained models.

    At each budget of a family, a parabola of the loss in the logarithm of the number of parameters N gives
    the best size (IsoFLOP); power laws of the budget C go through these optima. The joint form
    E + A / N^a + B / D^b (D: training tokens) is fitted by variable projection and by Chinchilla's Huber
    loss. Intervals are 95%, from replicates of the data.
    """

    output: Path | None = None
    """JSON file to write all fits to; None: they are only printed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_new_file("output", self.output)


def run(arguments: list[str]) -> int:
    """Parse, fit, print, write; returns the exit code."""
    config = parse(FitConfig, arguments, verb="scaling fit")
    fit = fit_table(config)
    print_fit(fit, config.effect)
    if config.output is not None:
        from megatron_dlm.scaling.fit import write_fit

        write_fit(fit, config.output)
        print(config.output)
    return 0


def fit_table(config: FitArguments) -> ScalingFit:
    """Fit all families of a table.

    Args:
        config: the table and how it is fitted.

    Returns:
        The fits, the reference's first.

    Raises:
        InputError: the table cannot be used, or has no such family.
    """
    from megatron_dlm.scaling.fit import fit_all
    from megatron_dlm.scaling.points import PUBLISHED, read_points

    table, reference = config.table, config.reference
    families = read_points(PUBLISHED if str(table) == PUBLISHED_TABLE and not table.exists() else table)
    names = [points.family for points in families]
    if reference is not None and reference not in names:
        raise InputError(f"reference: {reference!r} is not one of {', '.join(names)}")
    first = reference or names[0]
    families.sort(key=lambda points: points.family != first)
    return fit_all(table, families, replicates=config.replicates, seed=config.seed)


def print_fit(fit: ScalingFit, effect: float) -> None:
    """Print the fits as tables, and below them what could not be fitted.

    Args:
        fit: the fits.
        effect: share of the FLOPs that runs in pairs should tell.
    """
    from rich.console import Console

    from megatron_dlm.scaling.estimates import METHOD

    console = Console(width=max(132, Console().width))
    print(f"{fit.source}: {sum(len(each.points) for each in fit.families)} points")
    print(f"intervals: 95%, {METHOD}; {fit.replicates:,} replicates")
    for table in tables_of(fit, effect):
        console.print(table)
    for remark in fit.remarks:
        print(f"note: {remark}", file=sys.stderr)


def tables_of(fit: ScalingFit, effect: float) -> list[Table]:
    """Optima, laws, joint forms and FLOPs ratios as tables; those without rows are left out.

    Args:
        fit: the fits.
        effect: share of the FLOPs that runs in pairs should tell.

    Returns:
        The tables.
    """
    found = [_optima(fit), _laws(fit), _joint(fit), _biases(fit), _ratios(fit), _paired(fit, effect)]
    return [table for table in found if table.row_count]


def with_interval(found: Estimate, digits: str = ".4g") -> str:
    """An estimate as text."""
    if found.interval is None:
        return f"{found.value:{digits}} (-)"
    low, high = found.interval
    return f"{found.value:{digits}} ({low:{digits}} to {high:{digits}})"


def _optima(fit: ScalingFit) -> Table:
    from rich.table import Table

    table = Table(
        "family", "FLOPs", "points", "N*", "D*", "nats/token", "curvature", "", title="IsoFLOP optima"
    )
    for family in fit.families:
        for optimum in family.isoflop.optima:
            found = optimum.estimates()
            table.add_row(
                family.points.family,
                f"{optimum.budget_flops:g}",
                str(len(optimum.points)),
                *(with_interval(found[name]) for name in ("parameters", "tokens")),
                with_interval(found["nats_per_token"], ".4f"),
                with_interval(found["curvature"], ".3f"),
                optimum.remark,
            )
    return table


def _laws(fit: ScalingFit) -> Table:
    from rich.table import Table

    table = Table("family", "optimum", "coefficient", "exponent of C", title="power laws of the optima")
    names = {"parameters": "N*", "tokens": "D*", "nats_per_token": "nats/token"}
    for family in fit.families:
        for law in family.laws:
            found = law.estimates()
            table.add_row(
                family.points.family,
                names[law.quantity],
                with_interval(found["coefficient"], ".3g"),
                with_interval(found["exponent"]),
            )
    return table


def _joint(fit: ScalingFit) -> Table:
    from rich.table import Table

    from megatron_dlm.scaling.fit import joint_estimates

    names = ["E", "A", "a", "B", "b"]
    if any(each.joint is not None and each.joint.projection.log_R is not None for each in fit.families):
        names.append("R")
    table = Table("family", "fitted by", *names, "noise", title="joint form E + A / N^a + B / D^b")
    for family in fit.families:
        if (joint := family.joint) is None:
            continue
        found = joint_estimates(joint)
        cells = [with_interval(found[name], ".3g") if name in found else "" for name in names]
        table.add_row(family.points.family, "projection", *cells, f"{joint.noise:.4f}")
        huber = joint.huber.coefficients()
        table.add_row(
            "", "Huber", *(f"{float(huber[name]):.3g}" if name in huber else "" for name in names), ""
        )
    return table


def _biases(fit: ScalingFit) -> Table:
    from rich.table import Table

    table = Table(
        *("family", "FLOPs", "N*", "nats/token", "parabola's N* / form's", "parabola's loss less form's"),
        title="optima of the joint form, and what a parabola finds on its surface without noise",
    )
    for family in fit.families:
        for optimum in () if family.joint is None else family.joint.optima:
            table.add_row(
                family.points.family,
                f"{optimum.budget_flops:g}",
                with_interval(optimum.estimates["parameters"]),
                with_interval(optimum.estimates["nats_per_token"], ".4f"),
                f"{optimum.parabola_parameters_ratio:.3f}",
                f"{optimum.parabola_nats_difference:+.4f}",
            )
    return table


def _ratios(fit: ScalingFit) -> Table:
    from rich.table import Table

    table = Table(
        *("family", "FLOPs", "nats/token", "reference", "its FLOPs", "FLOPs ratio", ""),
        title="FLOPs at equal loss",
    )
    for each in fit.ratios:
        table.add_row(
            each.family,
            f"{each.budget_flops:g}",
            f"{each.nats_per_token:.4f}",
            each.reference,
            f"{each.reference_flops:.3g}",
            with_interval(each.ratio, ".3g"),
            each.remark,
        )
    return table


def _paired(fit: ScalingFit, effect: float) -> Table:
    from rich.table import Table

    table = Table(
        *("family", "reference", "FLOPs", "pairs", "nats/token more", "FLOPs ratio", f"tells {effect:.0%}"),
        title="FLOPs at equal loss, from runs that share size, budget, seed and data",
    )
    for each in fit.paired:
        seeds = each.seeds_to_resolve(effect)
        told = "yes" if each.resolves(effect) else f"no; {seeds:.0f} seeds would"
        table.add_row(
            each.family,
            each.reference,
            "all" if each.budget_flops is None else f"{each.budget_flops:g}",
            str(each.num_pairs),
            with_interval(each.nats_difference, "+.4f"),
            with_interval(each.ratio, ".3f"),
            told if math.isfinite(seeds) else "no",
        )
    return table
