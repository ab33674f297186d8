"""How many times the FLOPs of another family a family needs for the same loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dlm.scaling.estimates import Estimate, estimate
from megatron_dlm.scaling.isoflop import IsoflopFit, fit_power_law


@dataclass(frozen=True)
class FlopsRatio:
    """At one budget of a family."""

    family: str
    reference: str
    budget_flops: float
    nats_per_token: float
    """The family's optimum loss there, by its power law."""
    reference_flops: float
    """FLOPs at which the reference's law has that loss."""
    ratio: Estimate
    """`budget_flops` / `reference_flops`."""
    remark: str
    """Whether the reference's law is used beyond its points; empty if it is not."""


def flops_ratios(family: IsoflopFit, reference: IsoflopFit) -> list[FlopsRatio]:
    """Ratios at the budgets of a family, from the power laws of the optimum loss.

    Args:
        family: fit of the family; two usable budgets at least.
        reference: fit of the other family; two usable budgets at least.

    Returns:
        A ratio for each usable budget of the family, smallest budget first.
    """
    own = fit_power_law("nats_per_token", family.usable)
    other = fit_power_law("nats_per_token", reference.usable)
    reached = [float(optimum.nats_per_token_S[0]) for optimum in reference.usable]
    losses = [float(optimum.nats_per_token_S[0]) for optimum in family.usable]
    apart = min(losses) > max(reached) or max(losses) < min(reached)
    ratios = []
    for optimum in family.usable:
        log_loss_S = own.log_at(optimum.budget_flops)
        log_reference_S = (log_loss_S - other.log_coefficient_S) / other.exponent_S
        loss = float(np.exp(log_loss_S[0]))
        remark = ""
        if not min(reached) <= loss <= max(reached):
            remark = (
                f"extrapolated: {reference.family} has losses from {min(reached):.4g} to {max(reached):.4g}"
            )
            if apart:
                remark += ", which this family never meets"
        ratios.append(
            FlopsRatio(
                family=family.family,
                reference=reference.family,
                budget_flops=optimum.budget_flops,
                nats_per_token=loss,
                reference_flops=float(np.exp(log_reference_S[0])),
                ratio=estimate(np.exp(np.log(optimum.budget_flops) - log_reference_S)),
                remark=remark,
            )
        )
    return ratios
