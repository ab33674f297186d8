"""Pictures of runs and data; needs matplotlib (extra `eval`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dlm.telemetry.writers import read_metrics


def plot_loss(directory: Path, output: Path, *, title: str, unigram_entropy: float | None = None) -> None:
    """Plot the likelihood bound over optimizer steps.

    Args:
        directory: directory of the run, which holds metrics.jsonl.
        output: PNG file.
        title: title of the plot.
        unigram_entropy: nats per token, drawn as a line for comparison.
    """
    entries = read_metrics(directory)
    pyplot, figure, axes = _canvas()
    for kind, style in (("train", {"alpha": 0.4}), ("validation", {"marker": "o"})):
        points = [(entry["step"], entry["nats_per_token"]) for entry in entries if entry["kind"] == kind]
        axes.plot(*zip(*points, strict=True), label=kind, **style)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, linestyle="--", color="gray", label="unigram entropy")
    axes.set(title=title, xlabel="optimizer step", ylabel="negative log-likelihood bound (nats/token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def plot_by_time(
    bands: Sequence[tuple[float, float, float, float]], output: Path, *, title: str, of: str = "bound"
) -> None:
    """Plot how much each interval of diffusion times contributes to a bound.

    Args:
        bands: for each interval its first and last time, the bound's integrand in nats per token, and half
            the width of its 95% confidence interval.
        output: PNG file.
        title: title of the plot.
        of: name of the plotted quantity, if it is not a bound.
    """
    pyplot, figure, axes = _canvas()
    first, last, nats, half_widths = zip(*bands, strict=True)
    centers = [(a + b) / 2 for a, b in zip(first, last, strict=True)]
    widths = [b - a for a, b in zip(first, last, strict=True)]
    axes.bar(centers, nats, widths, yerr=half_widths, capsize=2, alpha=0.6)
    mean = sum(nats) / len(nats)
    axes.axhline(mean, linestyle="--", color="gray", label=f"{of}: {mean:.4g} nats/token")
    axes.set(title=title, xlabel="diffusion time t", ylabel=f"{of}'s integrand (nats/token), 95% interval")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def plot_pareto(
    series: Mapping[str, Sequence[tuple[float, float]]],
    published: Mapping[str, Sequence[tuple[float, float]]],
    output: Path,
    *,
    frontier: Sequence[tuple[float, float]],
) -> None:
    """Draw quality against speed.

    Args:
        series: (tokens/s, generative perplexity) by name.
        published: published results in the same form, drawn in grey in the background.
        output: PNG file.
        frontier: Pareto-optimal points, which no other point beats in both ways, fastest first.
    """
    pyplot, figure, axes = _canvas()
    for marker, (name, points) in zip("xv^s*", published.items(), strict=False):
        axes.plot(
            *zip(*points, strict=True), marker, color="gray", alpha=0.5, label=f"{name}, published", zorder=1
        )
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), "o", label=name, zorder=3)
    axes.plot(*zip(*frontier, strict=True), "-", color="black", alpha=0.4, label="frontier", zorder=2)
    axes.set(xscale="log", yscale="log", xlabel="tokens/s, whole calls", ylabel="generative perplexity")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(output, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def plot_scaling(
    series: Mapping[str, Sequence[tuple[float, float]]], output: Path, *, title: str, note: str
) -> None:
    """Draw speed against the number of GPUs, and beside it what is left of the first point's speed per GPU.

    Args:
        series: (GPUs, tokens/s of all of them) by name, smallest number first.
        output: PNG file.
        title: title of the plot.
        note: what the numbers assume, written below.
    """
    pyplot, figure, axes = _canvas(columns=2)
    speeds, shares = axes
    for marker, (name, points) in zip("os^v", series.items(), strict=False):
        gpus, tokens = zip(*points, strict=True)
        speeds.plot(gpus, tokens, f"{marker}-", label=name)
        kept = [100 * speed / count * gpus[0] / tokens[0] for count, speed in points]
        shares.plot(gpus, kept, f"{marker}-", label=name)
    counts = sorted({count for points in series.values() for count, _ in points})
    for panel in axes:
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts[:: max(1, len(counts) // 5)])
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.set_xlabel("GPUs")
        panel.grid(alpha=0.3, which="both")
    speeds.set(yscale="log", ylabel="tokens/s, predicted", title=title)
    speeds.legend()
    shares.axhline(100, linestyle="--", color="gray")
    shares.set(ylim=(0, 110), ylabel="speed of a GPU, % of that on the fewest")
    figure.text(0.5, -0.02, f"Assumed: {note}.", ha="center", va="top", wrap=True, fontsize=8)
    figure.savefig(output, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def plot_lengths(histogram: Sequence[tuple[int, int, int]], output: Path, *, title: str) -> None:
    """Plot a histogram of document lengths.

    Args:
        histogram: for each bin its first length in tokens, its end (exclusive) and its number of documents.
        output: PNG file.
        title: title of the plot.
    """
    pyplot, figure, axes = _canvas()
    lows, highs, counts = zip(*histogram, strict=True)
    axes.bar(
        lows,
        counts,
        width=[h - low for low, h in zip(lows, highs, strict=True)],
        align="edge",
        edgecolor="white",
    )
    axes.set_xscale("log", base=2)
    axes.set(title=title, xlabel="document length (tokens)", ylabel="documents")
    axes.grid(alpha=0.3)
    figure.savefig(output, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _canvas(columns: int = 1) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (8, 5) if columns == 1 else (6 * columns, 4.5)
    return (pyplot, *pyplot.subplots(1, columns, figsize=size))
