"""Guesses of the best size at a budget, around which a grid is laid."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_dlm.interfaces import InputError
from megatron_dlm.scaling.isoflop import fit_isoflop, fit_power_law
from megatron_dlm.scaling.points import published_points

Guess = Callable[[str, float], float]
"""Number of parameters from family and budget in FLOPs."""


def published_guess() -> Guess:
    """The power laws through the published optima; a family without one has their geometric mean."""
    laws = {}
    for points in published_points():
        fit = fit_isoflop(points, 0, np.random.default_rng(0))
        laws[points.family] = fit_power_law("parameters", fit.usable)

    def guess(family: str, budget_flops: float) -> float:
        # A variant is named after its family, for example mdlm-elbo.
        own = [law for name, law in laws.items() if family.split("-")[0] == name]
        return float(np.exp(np.mean([law.log_at(budget_flops)[0] for law in own or laws.values()])))

    return guess


def guess_of_fit(path: Path) -> Guess:
    """The power laws of an earlier fit.

    Args:
        path: fit.json.

    Returns:
        The guess; a family that the fit lacks is refused when it is asked for.

    Raises:
        InputError: no such file, or no laws of N* in it.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["laws"]
        laws = {
            row["family"]: (float(row["coefficient"]), float(row["exponent"]))
            for row in rows
            if row["quantity"] == "parameters"
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"guess: {path} is not a fit.json with laws: {error}") from error

    def guess(family: str, budget_flops: float) -> float:
        if family not in laws:
            raise InputError(f"guess: {path} has no law of {family}, only of {', '.join(laws) or 'none'}")
        coefficient, exponent = laws[family]
        return math.exp(math.log(coefficient) + exponent * math.log(budget_flops))

    return guess
