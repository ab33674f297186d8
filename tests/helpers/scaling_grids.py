"""Synthetic points: sizes, budgets and token counts of arXiv:2602.15014, losses from known laws."""

from dataclasses import replace

import numpy as np

from megatron_dlm.scaling.isoflop import fit_isoflop, fit_power_law
from megatron_dlm.scaling.joint_fit import fit_by_projection
from megatron_dlm.scaling.points import published_points

NO_NOISE = np.random.default_rng(0)


def published(family):
    """The paper's points of a family."""
    return next(points for points in published_points() if points.family == family)


def parabolic(family):
    """Points whose losses are parabolas in ln N around power laws; their exponents and optima by budget."""
    points = published(family)
    fit = fit_isoflop(points, 0, NO_NOISE)
    size, loss = (fit_power_law(name, fit.optima) for name in ("parameters", "nats_per_token"))
    half_curvature = np.mean([optimum.curvature_S[0] for optimum in fit.optima]) / 2
    losses, optima = np.empty(len(points)), {}
    for index, (budget, parameters) in enumerate(zip(points.budget_flops, points.parameters, strict=True)):
        log_n, log_loss = float(size.log_at(budget)[0]), float(loss.log_at(budget)[0])
        optima[float(budget)] = (np.exp(log_n), np.exp(log_loss))
        losses[index] = np.exp(log_loss) + half_curvature * (np.log(parameters) - log_n) ** 2
    exponents = {"parameters": float(size.exponent_S[0]), "nats_per_token": float(loss.exponent_S[0])}
    return replace(points, nats_per_token=losses), exponents, optima


def joint(family):
    """Points whose losses are those of the joint form that fits the paper's best, and that form."""
    points = published(family)
    law = fit_by_projection(points)
    losses = law.losses(points.parameters, points.tokens, points.unique_tokens)
    return replace(points, nats_per_token=losses), law


def noisy(points, sigma, rng):
    """The points with normal noise of `sigma` nats per token."""
    return replace(points, nats_per_token=points.nats_per_token + sigma * rng.normal(size=len(points)))
