"""Pictures of a fit, as PNG files; needs matplotlib (extra `eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dlm.scaling.estimates import Estimate, estimate
from megatron_dlm.scaling.fit import FamilyFit, ScalingFit
from megatron_dlm.scaling.isoflop import Optima
from megatron_dlm.scaling.lr_sweep import BestRates
from megatron_dlm.scaling.points import Floats, Points

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colors, which people with any color vision tell apart."""
MARKERS = "osD^v<>"
DPI = 110


def draw_all(fit: ScalingFit, directory: Path, published: Sequence[Points] = ()) -> dict[str, Path]:
    """Draw a fit.

    Args:
        fit: the fits.
        directory: for the PNG files.
        published: other points to lay under them, in grey.

    Returns:
        Files by title, in the order in which people read them; what was not fitted is left out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    drawings = {
        "IsoFLOP curves": (_isoflop, "isoflop.png"),
        "Optima against the budget": (_optima, "optima.png"),
        "FLOPs ratios at equal loss": (_ratios, "ratios.png"),
        "FLOPs ratios of pairs of runs": (_paired_ratios, "paired-ratios.png"),
        "Residuals": (_residuals, "residuals.png"),
        "Joint form": (_contours, "joint.png"),
    }
    found = {}
    for title, (draw, name) in drawings.items():
        figure = draw(fit, published)
        if figure is not None:
            figure.savefig(directory / name, dpi=DPI, bbox_inches="tight")
            found[title] = directory / name
    return found


def draw_rates(families: Sequence[BestRates], output: Path) -> None:
    """Draw losses against learning rates, a panel for each family.

    Args:
        families: best rates.
        output: PNG file.
    """
    figure, panels = _panels(len(families))
    for panel, family in zip(panels, families, strict=True):
        for index, optimum in enumerate(family.fit.optima):
            _parabola(panel, optimum, index, f"N = {optimum.budget_flops:,.0f}")
        panel.set(xscale="log", xlabel="learning rate", ylabel="nats/token", title=family.family)
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    figure.savefig(output, dpi=DPI, bbox_inches="tight")


def _figure(columns: int, *, rows: int = 1, share_y: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=share_y).ravel()


def _panels(count: int) -> tuple[Any, Any]:
    """A figure with as many panels, in rows of two or three."""
    columns = 2 if count in (2, 4) else min(3, count)
    figure, axes = _figure(columns, rows=-(-count // columns))
    for panel in axes[count:]:
        panel.set_visible(False)
    return figure, axes[:count]


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _isoflop(fit: ScalingFit, published: Sequence[Points]) -> Any:
    """Losses over sizes with the parabola of each budget, a panel for each family."""
    families = [family for family in fit.families if family.isoflop.optima]
    if not families:
        return None
    figure, panels = _panels(len(families))
    for panel, family in zip(panels, families, strict=True):
        _lay_under(panel, family, published)
        for index, optimum in enumerate(family.isoflop.optima):
            _parabola(panel, optimum, index, f"{optimum.budget_flops:g} FLOPs")
        panel.set(xscale="log", xlabel="parameters N", ylabel="nats/token", title=family.points.family)
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    return figure


def _parabola(panel: Any, optimum: Optima, index: int, label: str) -> None:
    """Points, the parabola through them, and its vertex if it is an optimum."""
    part, color = optimum.points, _color(index)
    panel.plot(part.parameters, part.nats_per_token, MARKERS[index % 7], color=color, ms=5)
    places = np.geomspace(part.parameters.min(), part.parameters.max(), 100)
    panel.plot(places, optimum.at(places), color=color, label=label)
    if not optimum.remark:
        where = optimum.parameters_S[0], optimum.nats_per_token_S[0]
        panel.plot(*where, "x", color="black", ms=9, mew=2, zorder=4)


def _lay_under(panel: Any, family: FamilyFit, published: Sequence[Points]) -> None:
    for other in published:
        if other.family.lower() == family.points.family.split("-")[0].lower():
            panel.plot(other.parameters, other.nats_per_token, ".", color="0.7", zorder=1, label="published")


def _optima(fit: ScalingFit, published: Sequence[Points]) -> Any:
    """Best size and loss over budgets with intervals and power laws."""
    if not any(family.isoflop.usable for family in fit.families):
        return None
    figure, axes = _figure(2)
    names = (("parameters", "best number of parameters N*"), ("nats_per_token", "best nats/token L*"))
    for panel, (name, label) in zip(axes, names, strict=True):
        for index, family in enumerate(fit.families):
            usable = family.isoflop.usable
            if not usable:
                continue
            found = [optimum.estimates()[name] for optimum in usable]
            values = np.array([each.value for each in found])
            ends = np.array([each.interval or (each.value, each.value) for each in found]).T
            errors = np.maximum(0.0, [values - ends[0], ends[1] - values])
            budgets = np.array([optimum.budget_flops for optimum in usable])
            style = {"color": _color(index), "label": family.points.family}
            panel.errorbar(budgets, values, errors, fmt=MARKERS[index % 7], capsize=3, **style)
            for law in family.laws:
                if law.quantity == name:
                    line = [float(np.exp(law.log_at(budget)[0])) for budget in budgets]
                    panel.plot(budgets, line, "--", color=_color(index))
        panel.set(xscale="log", yscale="log", xlabel="FLOPs C", ylabel=label)
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    return figure


def _ratios(fit: ScalingFit, published: Sequence[Points]) -> Any:
    """FLOPs ratios over budgets; hollow where the reference's law is extrapolated."""
    if not fit.ratios:
        return None
    figure, (panel,) = _figure(1)
    for index, family in enumerate(dict.fromkeys(ratio.family for ratio in fit.ratios), start=1):
        own = [ratio for ratio in fit.ratios if ratio.family == family]
        budgets = [ratio.budget_flops for ratio in own]
        panel.plot(budgets, [ratio.ratio.value for ratio in own], color=_color(index), label=family)
        for ratio in own:
            _with_interval(panel, ratio.budget_flops, ratio.ratio, index, hollow=bool(ratio.remark))
    _label_ratios(panel, fit.ratios[0].reference)
    panel.legend(fontsize=8, title="hollow: extrapolated", title_fontsize=8)
    return figure


def _paired_ratios(fit: ScalingFit, published: Sequence[Points]) -> Any:
    """FLOPs ratios of runs in pairs over budgets, a panel for each reference; a band for all budgets."""
    known = [ratio for ratio in fit.paired if np.isfinite(ratio.ratio.value)]
    references = list(dict.fromkeys(ratio.reference for ratio in known))
    if not references:
        return None
    figure, panels = _panels(len(references))
    colors = {name: index for index, name in enumerate(dict.fromkeys(ratio.family for ratio in known), 1)}
    for panel, reference in zip(panels, references, strict=True):
        for ratio in (each for each in known if each.reference == reference):
            index = colors[ratio.family]
            if ratio.budget_flops is not None:
                _with_interval(panel, ratio.budget_flops, ratio.ratio, index)
                continue
            panel.axhline(ratio.ratio.value, color=_color(index), label=ratio.family)
            panel.axhspan(*_bounds(ratio.ratio), color=_color(index), alpha=0.15)
        _label_ratios(panel, reference)
        panel.legend(fontsize=8, title="line: all budgets", title_fontsize=8)
    return figure


def _with_interval(panel: Any, budget: float, ratio: Estimate, index: int, *, hollow: bool = False) -> None:
    low, high = _bounds(ratio)
    panel.errorbar(
        budget,
        ratio.value,
        [[max(0.0, ratio.value - low)], [max(0.0, high - ratio.value)]],
        fmt=MARKERS[index % 7],
        color=_color(index),
        capsize=3,
        mfc="white" if hollow else None,
    )


def _bounds(ratio: Estimate) -> tuple[float, float]:
    """The interval, or the value alone where there is none or it has no end."""
    if ratio.interval is None or not np.isfinite(ratio.interval).all():
        return ratio.value, ratio.value
    return ratio.interval


def _label_ratios(panel: Any, reference: str) -> None:
    from matplotlib.ticker import LogFormatter

    panel.axhline(1, color="0.5", linestyle="--")
    panel.set(xscale="log", yscale="log", xlabel="FLOPs of the family")
    # 20 and not 2 x 10^1.
    panel.yaxis.set_major_formatter(LogFormatter())
    panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    panel.set_ylabel(f"times the FLOPs of {reference} at equal loss")
    panel.grid(alpha=0.3, which="both")


def _residuals(fit: ScalingFit, published: Sequence[Points]) -> Any:
    """Measured less fitted losses, of parabolas and of the joint form."""
    figure, axes = _figure(2, share_y=True)
    drawn = False
    for index, family in enumerate(fit.families):
        style = {"color": _color(index), "label": family.points.family, "ms": 5}
        isoflop, joint = family.isoflop, family.joint
        if isoflop.optima:
            sizes = np.concatenate([optimum.points.parameters for optimum in isoflop.optima])
            axes[0].plot(sizes, np.concatenate(isoflop.residuals), MARKERS[index % 7], **style)
            drawn = True
        if joint is not None:
            points = family.points
            fitted = joint.projection.of_the_data().losses(
                points.parameters, points.tokens, points.unique_tokens
            )
            axes[1].plot(points.parameters, points.nats_per_token - fitted, MARKERS[index % 7], **style)
            drawn = True
    for panel, title in zip(axes, ("parabolas", "joint form, projection"), strict=True):
        panel.axhline(0, color="0.5", linestyle="--")
        panel.set(xscale="log", xlabel="parameters N", title=title)
        panel.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("measured less fitted (nats/token)")
    axes[0].legend(fontsize=8)
    return figure if drawn else None


def _contours(fit: ScalingFit, published: Sequence[Points]) -> Any:
    """Loss of the joint form over sizes and tokens, with the points."""
    families = [family for family in fit.families if family.joint is not None]
    if not families:
        return None
    figure, panels = _panels(len(families))
    for panel, family in zip(panels, families, strict=True):
        points, joint = family.points, family.joint
        assert joint is not None
        sizes, tokens = _around(points.parameters), _around(points.tokens)
        grid_n, grid_d = np.meshgrid(sizes, tokens)
        unique = np.full_like(grid_d, float(points.unique_tokens.max()))
        contours = panel.contour(
            grid_n, grid_d, joint.projection.of_the_data().losses(grid_n, grid_d, unique), 14, cmap="cividis"
        )
        panel.clabel(contours, fontsize=7)
        panel.plot(points.parameters, points.tokens, ".", color="black", ms=4)
        low = estimate(joint.projection.E)
        panel.set(xscale="log", yscale="log", xlabel="parameters N", ylabel="tokens D")
        panel.set_title(f"{points.family}: E = {low.value:.3g} nats/token")
    return figure


def _around(values: Floats) -> Floats:
    return np.geomspace(values.min() / 1.5, values.max() * 1.5, 60)
