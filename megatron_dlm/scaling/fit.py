"""All fits of a table of points, and their record fit.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.files import write_json
from megatron_dlm.scaling.estimates import METHOD, Estimate, estimate
from megatron_dlm.scaling.flops_ratio import FlopsRatio, flops_ratios
from megatron_dlm.scaling.isoflop import QUANTITIES, IsoflopFit, PowerLaw, fit_isoflop, fit_power_law
from megatron_dlm.scaling.joint_fit import (
    JointLaw,
    fit_by_huber,
    fit_by_projection,
    replicate_projection,
)
from megatron_dlm.scaling.joint_optimum import JointOptimum, TokenCost, joint_optima
from megatron_dlm.scaling.paired_ratio import PairedRatio, all_paired_ratios
from megatron_dlm.scaling.points import Points


@dataclass(frozen=True)
class JointFit:
    """Both joint fits of a family."""

    projection: JointLaw
    """With replicates."""
    huber: JointLaw
    noise: float
    """Standard deviation of the projection's residuals in nats per token."""
    optima: tuple[JointOptimum, ...]
    """The projection's, at each budget."""
    remark: str
    """Which coefficients the data do not determine; empty if they do."""


@dataclass(frozen=True)
class FamilyFit:
    """All fits of a family."""

    points: Points
    isoflop: IsoflopFit
    laws: tuple[PowerLaw, ...]
    """Empty with fewer than two usable budgets."""
    joint: JointFit | None
    remarks: tuple[str, ...]
    """What could not be fitted, and why."""


@dataclass(frozen=True)
class ScalingFit:
    """Fits of all families of a table."""

    source: Path
    replicates: int
    seed: int
    families: tuple[FamilyFit, ...]
    ratios: tuple[FlopsRatio, ...]
    paired: tuple[PairedRatio, ...]

    @property
    def remarks(self) -> list[str]:
        """What could not be fitted, and why."""
        return [remark for family in self.families for remark in family.remarks]


def fit_all(source: Path, families: Sequence[Points], *, replicates: int, seed: int) -> ScalingFit:
    """Fit every family of a table.

    Args:
        source: the table, named in the record.
        families: its points; the first family is the one that the others are compared with.
        replicates: number of replicates for intervals.
        seed: random seed of their noise.

    Returns:
        The fits.

    Raises:
        InputError: no family has a budget with three sizes, or points enough for the joint form.
    """
    fits = tuple(
        _fit_family(points, replicates, np.random.default_rng([seed, index]))
        for index, points in enumerate(families)
    )
    if not any(fit.isoflop.optima or fit.joint for fit in fits):
        raise InputError(f"{source}: nothing can be fitted: {'; '.join(r for f in fits for r in f.remarks)}")
    able = [fit.isoflop for fit in fits if fit.laws]
    ratios = [ratio for other in able[1:] for ratio in flops_ratios(other, able[0])]
    pairs = [(fit.points, fit.isoflop) for fit in fits]
    paired = all_paired_ratios(pairs, replicates, np.random.default_rng([seed, len(fits)]))
    return ScalingFit(source, replicates, seed, fits, tuple(ratios), tuple(paired))


def _fit_family(points: Points, replicates: int, rng: np.random.Generator) -> FamilyFit:
    isoflop = fit_isoflop(points, replicates, rng)
    remarks = [*isoflop.left_out]
    remarks += [
        f"{points.family} at {each.budget_flops:g} FLOPs: {each.remark} ({each.points.describe_rows()}); "
        "left out of its power laws"
        for each in isoflop.optima
        if each.remark
    ]
    laws: tuple[PowerLaw, ...] = ()
    if len(isoflop.usable) >= 2:
        laws = tuple(fit_power_law(quantity, isoflop.usable) for quantity in QUANTITIES)
    else:
        remarks.append(f"{points.family}: {len(isoflop.usable)} usable budgets, a power law needs 2")
    joint = None
    try:
        joint = _fit_joint(points, replicates, rng)
    except InputError as error:
        remarks.append(str(error))
    else:
        remarks += [f"{points.family}: {joint.remark}"] if joint.remark else []
    return FamilyFit(points, isoflop, laws, joint, tuple(remarks))


def _fit_joint(points: Points, replicates: int, rng: np.random.Generator) -> JointFit:
    law = fit_by_projection(points)
    residuals = points.nats_per_token - law.losses(points.parameters, points.tokens, points.unique_tokens)
    freedom = len(points) - len(law.coefficients())
    noise = math.sqrt(float(np.sum(residuals**2)) / freedom) if freedom > 0 else math.nan
    zero = [name for name, value in law.coefficients().items() if name in "EAB" and not value > 0]
    remark = f"the joint form's {' and '.join(zero)} is 0: the data do not determine it" if zero else ""
    replicated = replicate_projection(points, law, replicates, rng)
    optima = joint_optima(replicated, TokenCost(points), points)
    return JointFit(replicated, fit_by_huber(points), noise, optima, remark)


def write_fit(fit: ScalingFit, path: Path) -> None:
    """Write fit.json.

    Args:
        fit: the fits.
        path: the file, replaced if it exists.
    """
    record = {
        "source": str(fit.source),
        "intervals": f"95%, {METHOD}",
        "replicates": fit.replicates,
        "seed": fit.seed,
        "optima": [row for family in fit.families for row in _optima(family)],
        "laws": [row for family in fit.families for row in _laws(family)],
        "joint": [row for family in fit.families for row in _joint(family)],
        "ratios": [_ratio(ratio) for ratio in fit.ratios],
        "paired_ratios": [_paired(ratio) for ratio in fit.paired],
        "remarks": fit.remarks,
    }
    write_json(path, _without_nan(record))


def _with_intervals(found: dict[str, Estimate]) -> dict[str, Any]:
    return {
        **{name: each.value for name, each in found.items()},
        "intervals": {name: each.interval for name, each in found.items()},
    }


def _optima(family: FamilyFit) -> Iterable[dict[str, Any]]:
    for optimum in family.isoflop.optima:
        yield {
            "family": family.points.family,
            "budget_flops": optimum.budget_flops,
            **_with_intervals(optimum.estimates()),
            "num_points": len(optimum.points),
            "noise_nats": family.isoflop.noise,
            "remark": optimum.remark,
        }


def _laws(family: FamilyFit) -> Iterable[dict[str, Any]]:
    for law in family.laws:
        yield {
            "family": family.points.family,
            "quantity": law.quantity,
            **_with_intervals(law.estimates()),
        }


def joint_estimates(joint: JointFit) -> dict[str, Estimate]:
    """The projection's coefficients with intervals."""
    return {name: estimate(values) for name, values in joint.projection.coefficients().items()}


def _joint(family: FamilyFit) -> Iterable[dict[str, Any]]:
    joint = family.joint
    if joint is None:
        return
    yield {
        "family": family.points.family,
        "method": "projection",
        **_with_intervals(joint_estimates(joint)),
        "noise_nats": joint.noise,
        "remark": joint.remark,
        "optima": [_joint_optimum(optimum) for optimum in joint.optima],
    }
    yield {
        "family": family.points.family,
        "method": "huber",
        **{name: float(value) for name, value in joint.huber.coefficients().items()},
    }


def _joint_optimum(optimum: JointOptimum) -> dict[str, Any]:
    return {
        "budget_flops": optimum.budget_flops,
        **_with_intervals(optimum.estimates),
        "parabola_parameters_ratio": optimum.parabola_parameters_ratio,
        "parabola_nats_difference": optimum.parabola_nats_difference,
    }


def _ratio(ratio: FlopsRatio) -> dict[str, Any]:
    return {
        "family": ratio.family,
        "reference": ratio.reference,
        "budget_flops": ratio.budget_flops,
        "nats_per_token": ratio.nats_per_token,
        "reference_flops": ratio.reference_flops,
        **_with_intervals({"ratio": ratio.ratio}),
        "extrapolated": bool(ratio.remark),
        "remark": ratio.remark,
    }


def _paired(ratio: PairedRatio) -> dict[str, Any]:
    return {
        "family": ratio.family,
        "reference": ratio.reference,
        "budget_flops": ratio.budget_flops,
        "num_pairs": ratio.num_pairs,
        **_with_intervals({"nats_difference": ratio.nats_difference, "ratio": ratio.ratio}),
    }


def _without_nan(value: Any) -> Any:
    """JSON has no NaN or infinity: None instead."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
