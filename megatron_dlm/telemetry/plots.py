"""Pictures of a run; needs matplotlib (extra `eval`)."""

from __future__ import annotations

from pathlib import Path

from megatron_dlm.telemetry.writers import read_metrics


def plot_loss(directory: Path, output: Path, *, title: str, unigram_entropy: float | None = None) -> None:
    """Draw the bound over steps.

    Args:
        directory: of the run, with metrics.jsonl.
        output: PNG file.
        title: of the picture.
        unigram_entropy: nats per token, drawn as a line for comparison.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = read_metrics(directory)
    figure, axes = pyplot.subplots(figsize=(8, 5))
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
