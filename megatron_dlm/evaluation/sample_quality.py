"""Sample quality against speed: unigram entropy, Pareto frontiers, published points (arXiv:2602.15014)."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_dlm.interfaces import InputError


def unigram_entropy(samples: Sequence[Sequence[int]]) -> float:
    """Entropy in nats of the token frequencies inside a sample, averaged over samples.

    It is low for a text that repeats itself, even if a judge finds the text likely.

    Args:
        samples: token ids of each sample.

    Returns:
        Mean entropy in nats.
    """
    total = 0.0
    for sample in samples:
        counts = Counter(sample)
        size = len(sample)
        total -= sum(n / size * math.log(n / size) for n in counts.values())
    return total / len(samples)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Pareto frontier: the points that no other point beats in both coordinates.

    Args:
        points: pairs (higher is better, lower is better), for example speed and perplexity.

    Returns:
        Indices of the frontier's points, from highest first coordinate to lowest second coordinate.
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1]))
    kept: list[int] = []
    best = math.inf
    for index in order:
        if points[index][1] < best:
            best = points[index][1]
            kept.append(index)
    return kept


def reference_points(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Read published speed and quality points to plot as a reference.

    Args:
        path: CSV file with the columns family, throughput_tok_per_s and gen_ppl.

    Returns:
        List of (tokens/s, generative perplexity) by family.

    Raises:
        InputError: the file is unreadable or has other columns.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                point = (float(row["throughput_tok_per_s"]), float(row["gen_ppl"]))
                found.setdefault(row["family"], []).append(point)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"reference: {path}: not a table of family, throughput_tok_per_s, gen_ppl: {error}"
        ) from error
    return found
