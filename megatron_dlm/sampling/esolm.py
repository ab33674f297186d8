"""In which order, and how many at a time, Eso-LM reveals tokens (arXiv:2506.01928).

A plan is an order of positions and the sizes of the groups it is cut into; a step reveals one group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def block_plan(uniform_BT: NDArray[np.float64], tokens_per_step: int) -> tuple[NDArray[np.int64], list[int]]:
    """T steps that each reveal tokens T apart, the steps' offsets in a random order for each sample.

    Args:
        uniform_BT: float64 [B, T] draws in [0, 1), T the number of steps.
        tokens_per_step: P; the length is P T.

    Returns:
        int64 [B, P T] order, and T group sizes.
    """
    offsets_BT = np.argsort(uniform_BT, axis=1, kind="stable")
    num_steps = uniform_BT.shape[1]
    starts_P = np.arange(tokens_per_step) * num_steps
    order = offsets_BT[:, :, None] + starts_P
    return order.reshape(len(order), -1), [tokens_per_step] * num_steps


def block_autoregressive_plan(
    segment_length: int, num_groups: int, segments_per_group: int
) -> tuple[NDArray[np.int64], list[int]]:
    """Group after group; in each the segments' first tokens one by one, then all segments side by side.

    Args:
        segment_length: T tokens of a segment.
        num_groups: S.
        segments_per_group: P; the length is S P T.

    Returns:
        int64 [S P T] order, and the group sizes, S (P + T - 1) of them.
    """
    offsets_T, starts_P = np.arange(segment_length), np.arange(segments_per_group) * segment_length
    one_group = (offsets_T[:, None] + starts_P).reshape(-1)
    order = np.arange(num_groups)[:, None] * (segment_length * segments_per_group) + one_group
    sizes = [1] * segments_per_group + [segments_per_group] * (segment_length - 1)
    return order.reshape(-1), sizes * num_groups


def ancestral_sizes(
    num_tokens: int, alphas: Sequence[float], draw_binomial: Callable[[int, float], int]
) -> list[int]:
    """How many of the masked tokens each diffusion step reveals, steps that reveal none left out.

    Args:
        num_tokens: masked at the start.
        alphas: alpha at the times of the steps' edges, from noise to clean, not falling.
        draw_binomial: (trials, probability) -> successes.

    Returns:
        Group sizes; what they leave over is filled left to right, or at alpha_0 = 1 by one more step.
    """
    sizes, left = [], num_tokens
    for alpha_t, alpha_s in itertools.pairwise(alphas):
        revealed = draw_binomial(left, min(1.0, (alpha_s - alpha_t) / (1.0 - alpha_t)))
        if revealed:
            sizes.append(int(revealed))
        left -= revealed
    if left and alphas[-1] == 1.0:
        sizes.append(left)
    return sizes
