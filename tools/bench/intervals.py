"""How often the 95% intervals that evaluations print hold the truth, by simulation with fixed seeds.

    python tools/bench/intervals.py [--trials 4000]

Block means are those of `evaluate gate`, sequences of unequal length those of `evaluate nll`, shares of right
answers those of `evaluate gsm8k`; the last table is the early stop of multiple-choice scoring. "Gaussian"
values keep what is promised; "lognormal" ones (sigma 1) are as skewed as losses of few, long documents.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from megatron_dlm.evaluation.intervals import block_means, leader, wilson
from megatron_dlm.evaluation.nelbo_statistics import ratio

Draw = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]
DRAWS: dict[str, Draw] = {
    "Gaussian": lambda generator, shape: generator.normal(size=shape),
    # Of mean 0.
    "lognormal": lambda generator, shape: generator.lognormal(size=shape) - math.exp(0.5),
}
BLOCKS = (5, 10, 30)
SEQUENCES = (10, 30, 128)


def block_coverage(draw: Draw, num_blocks: int, trials: int) -> float:
    """Share of intervals of block means, 20 values a block, that hold the true mean."""
    generator = np.random.default_rng(num_blocks)
    return _held(lambda: block_means(draw(generator, (20 * num_blocks,)), num_blocks), 0.0, trials)


def few_values_coverage(draw: Draw, count: int, trials: int) -> float:
    """Share of intervals of a few single values that hold the true mean."""
    generator = np.random.default_rng(count)
    return _held(lambda: block_means(draw(generator, (count,)), count), 0.0, trials)


def sequence_coverage(draw: Draw, count: int, trials: int) -> float:
    """Share of intervals of nats a token over sequences of 5 to 50 tokens that hold the true 2 nats."""
    generator = np.random.default_rng(count)

    def estimate() -> object:
        tokens = generator.integers(5, 50, count)
        return ratio(tokens * 2.0 + 3 * draw(generator, (count,)) * np.sqrt(tokens), tokens)

    return _held(estimate, 2.0, trials)


def _held(estimate: Callable[[], object], truth: float, trials: int) -> float:
    means = [estimate() for _ in range(trials)]
    return sum(mean.low <= truth <= mean.high for mean in means) / trials  # type: ignore[attr-defined]


def share_coverage(count: int, trials: int) -> float:
    """Share of Wilson's intervals of `count` answers that hold the true share, over all shares alike."""
    generator = np.random.default_rng(count)
    held = 0
    for truth in generator.uniform(size=trials):
        low, high = wilson(int(generator.binomial(count, truth)), count)
        held += low <= truth <= high
    return held / trials


def wrong_choices(
    draw: Draw, num_choices: int, trials: int, *, is_certain: bool = False, looks: int = 8, copies: int = 16
) -> float:
    """Share of questions whose early stop takes a choice that is not the best, at confidence 0.99.

    All choices cost the same but for a trifle, so that almost half of what is decided is wrong: the worst
    case. With `is_certain` the best choice's copies all cost the same.
    """
    generator = np.random.default_rng(num_choices)
    wrong = 0
    for _ in range(trials):
        costs = [draw(generator, (looks * copies,)) for _ in range(num_choices)]
        if is_certain:
            costs[0] = np.zeros(looks * copies)
        for look in range(1, looks + 1):
            chosen = leader([cost[: look * copies] for cost in costs], confidence=0.99, looks=looks)
            if chosen is not None:
                # The first one is cheaper by a trifle.
                wrong += chosen != 0
                break
    return wrong / trials


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=4000, help="simulated experiments a number (4000)")
    trials = parser.parse_args().trials
    console = Console(width=100)
    table = Table("95% interval of", *DRAWS, title="share of intervals that hold the truth", box=None)
    for name, coverage, counts in (
        ("{} block means, 20 values each", block_coverage, BLOCKS),
        ("{} single values", few_values_coverage, BLOCKS),
        ("{} sequences of unequal length", sequence_coverage, SEQUENCES),
    ):
        for count in counts:
            cells = [f"{coverage(draw, count, trials):.1%}" for draw in DRAWS.values()]
            table.add_row(name.format(count), *cells)
    console.print(table)
    for count in (20, 100):
        print(f"share of {count} right answers (Wilson): {share_coverage(count, trials):.1%}")
    table = Table("choices", *DRAWS, title="wrong early decisions at confidence 0.99, 8 looks", box=None)
    for num_choices in (2, 4):
        for is_certain, what in ((False, "alike"), (True, "the best one certain")):
            shares = [
                wrong_choices(draw, num_choices, trials, is_certain=is_certain) for draw in DRAWS.values()
            ]
            table.add_row(f"{num_choices}, {what}", *(f"{share:.2%}" for share in shares))
    console.print(table)


if __name__ == "__main__":
    main()
