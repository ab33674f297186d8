"""Time of a network call in each sampler against ancestral sampling's, both in one run.

    python tools/bench/samplers.py [--families mdlm duo] [--steps 32] [--size 6M] [--length 512]

The exported model with random weights. Samplers take turns; a time is the median over repeats of a whole
call to `generate`, divided by its network calls, which are counted. Rows are positions with logits.
Batch 1 stands beside the batch, as the latency of one text.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tools.bench.sample import build_model
from tools.bench.step import show

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "mdlm": {
        "ancestral": {"sampler": "ancestral"},
        "psi, kappa 0.5": {"sampler": "psi", "kappa": 0.5},
        "remasking, cap 0.02": {"sampler": "remasking", "remasking": "cap", "remasking_strength": 0.02},
        "remasking, rescale 0.02": {
            **{"sampler": "remasking", "remasking": "rescale", "remasking_strength": 0.02},
        },
        "remasking, confidence 1": {
            **{"sampler": "remasking", "remasking": "confidence", "remasking_strength": 1.0},
        },
        "remasking, loop 0.02": {"sampler": "remasking", "remasking": "loop", "remasking_strength": 0.02},
        "confidence": {"sampler": "confidence"},
        "ancestral, guidance 2": {"sampler": "ancestral", "guidance_scale": 2.0},
    },
    "duo": {
        "ancestral": {"sampler": "ancestral"},
        "psi, kappa 0.5": {"sampler": "psi", "kappa": 0.5},
    },
}
"""Samplers of each family; the first one is what the others are compared with."""
COLUMNS = ("family", "sampler", "texts", "calls", "rows", "s", "ms a call", "ancestral ms a call", "ratio")


class Counts:
    """Network calls, and rows of the head."""

    def __init__(self) -> None:
        self.calls = self.rows = 0


@contextmanager
def counting(model: Any) -> Iterator[Counts]:
    """Count what a model is asked for."""
    counts = Counts()
    hidden, head = model.hidden, model.head

    def counted_hidden(*arguments: Any, **named: Any) -> Any:
        counts.calls += 1
        return hidden(*arguments, **named)

    def counted_head(rows: torch.Tensor) -> Any:
        counts.rows += len(rows)
        return head(rows)

    model.hidden, model.head = counted_hidden, counted_head
    try:
        yield counts
    finally:
        model.hidden, model.head = hidden, head


def timed(model: Any, texts: int, length: int, settings: dict[str, Any]) -> tuple[float, Counts]:
    """Seconds of one call, and what it asked for."""
    with counting(model) as counts:
        start = time.perf_counter()
        # A prompt of one token, since guidance needs one.
        model.generate([[5]] * texts, max_length=length, **settings)
        return time.perf_counter() - start, counts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=32, help="denoising steps")
    parser.add_argument("--size", default="6M", help="published size")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4], help="texts of a call")
    parser.add_argument("--vocabulary-size", type=int, default=32001, help="ids, mask token included")
    parser.add_argument("--repeats", type=int, default=3, help="measured calls of each sampler")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for family in arguments.families:
        model: Any = build_model(family, arguments.size, arguments.vocabulary_size, arguments.length)
        model.generate(max_length=8, num_steps=2)
        for texts in arguments.batch_sizes:
            found: dict[str, list[float]] = {name: [] for name in VARIANTS[family]}
            counts = {}
            for _ in range(arguments.repeats):
                for name, settings in VARIANTS[family].items():
                    settings = settings | {"num_steps": arguments.steps}
                    seconds, counts[name] = timed(model, texts, arguments.length, settings)
                    found[name].append(seconds)
            own = {name: 1e3 * statistics.median(times) / counts[name].calls for name, times in found.items()}
            plain = next(iter(own.values()))
            for name, milliseconds in own.items():
                asked = [str(texts), f"{counts[name].calls}", f"{counts[name].rows:,}"]
                seconds = statistics.median(found[name])
                cells = [
                    f"{seconds:.2f}",
                    f"{milliseconds:.1f}",
                    f"{plain:.1f}",
                    f"{milliseconds / plain:.2f}",
                ]
                rows.append([family, name, *asked, *cells])
    title = (
        f"{arguments.size}, {arguments.steps} steps, {arguments.length} tokens, {arguments.threads} threads"
    )
    show(title, list(COLUMNS), rows)


if __name__ == "__main__":
    main()
