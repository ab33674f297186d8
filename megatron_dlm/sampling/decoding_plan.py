"""In which order, and at which step, masked tokens are revealed: drawn before the network is called.

The order of ancestral sampling does not depend on what is revealed, so it can be known beforehand: a step
that reveals nothing of a sequence costs nothing, and a causal network knows where to look.
Shape legend: B sequences, L tokens, n unknown tokens of one sequence, T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GIVEN = -1
"""The step of tokens that are given."""
Part = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Order (int64 [n], indices of unknown tokens) and the step of each entry, never falling."""


@dataclass
class Plan:
    """Orders and steps of a batch."""

    order_BL: Tensor
    """int64 [B, L], all positions in the order in which they become known; given ones first."""
    step_BL: Tensor
    """int64 [B, L], the step of each entry of the order; GIVEN for given ones."""

    def __post_init__(self) -> None:
        self.num_steps = int(self.step_BL.max()) + 1
        self.step_at_BL = torch.empty_like(self.step_BL).scatter_(1, self.order_BL, self.step_BL)
        """The step at which each position is revealed."""


def plan_of(given_BL: NDArray[np.bool_], part_of_row: Callable[[int, NDArray[np.int64]], Part]) -> Plan:
    """A plan from one for the unknown tokens of each sequence.

    Args:
        given_BL: True where a token is given.
        part_of_row: (row, int64 [n] positions of its unknown tokens) -> order and steps of these.

    Returns:
        The plan.
    """
    orders, steps = [], []
    for row, given in enumerate(given_BL):
        unknown, known = np.flatnonzero(~given), np.flatnonzero(given)
        order, step = part_of_row(row, unknown)
        orders.append(np.concatenate([known, unknown[order]]))
        steps.append(np.concatenate([np.full(len(known), GIVEN), step]))
    return Plan(torch.from_numpy(np.stack(orders)), torch.from_numpy(np.stack(steps)))


def reveal_shares(alphas: Sequence[float]) -> NDArray[np.float64]:
    """Which share of the masked tokens each step of the reverse process reveals.

    Absorbing-state posterior (arXiv:2406.07524, equation 7): (alpha_s - alpha_t) / (1 - alpha_t).

    Args:
        alphas: alpha at the steps' edges, from noise to clean, not falling.

    Returns:
        float64 [len(alphas) - 1].
    """
    edges = np.asarray(alphas, dtype=np.float64)
    # Rounding may carry the last share of a schedule that ends at 1 above it.
    return np.minimum(1.0, np.diff(edges) / (1.0 - edges[:-1]))


def ancestral_part(uniform_n: NDArray[np.float64], shares_T: NDArray[np.float64]) -> Part:
    """Each token is revealed at a step of its own, as in the reverse process; the rest left to right.

    Args:
        uniform_n: float64 [n] draws in [0, 1).
        shares_T: of the masked tokens, revealed at each step.

    Returns:
        In each step the tokens in random order; those that no step reveals (Eso-LM at alpha_0 < 1,
        arXiv:2506.01928) one a step behind them.
    """
    revealed_by_T = 1.0 - np.cumprod(1.0 - shares_T)
    steps = np.searchsorted(revealed_by_T, uniform_n, side="right")
    order = np.argsort(uniform_n, kind="stable")
    diffused = int((steps < len(shares_T)).sum())
    order = np.concatenate([order[:diffused], np.sort(order[diffused:])])
    left_over = len(shares_T) + np.arange(len(order) - diffused)
    return order, np.concatenate([steps[order[:diffused]], left_over])


def block_part(uniform_T: NDArray[np.float64], tokens_per_step: int) -> Part:
    """T steps that each reveal tokens T apart, the steps' offsets in random order (arXiv:2506.01928).

    Args:
        uniform_T: float64 [T] draws in [0, 1), T the number of steps.
        tokens_per_step: P; P T tokens in all.

    Returns:
        Order and steps of P T tokens.
    """
    num_steps = len(uniform_T)
    offsets_T = np.argsort(uniform_T, kind="stable")
    order_TP = offsets_T[:, None] + np.arange(tokens_per_step) * num_steps
    return order_TP.reshape(-1), np.repeat(np.arange(num_steps), tokens_per_step)


def block_autoregressive_part(segment_length: int, num_groups: int, segments_per_group: int) -> Part:
    """Group after group; in each the segments' first tokens one by one, then all segments side by side.

    Args:
        segment_length: T tokens of a segment.
        num_groups: S.
        segments_per_group: P; S P T tokens in all.

    Returns:
        Order and steps of S P T tokens, in S (P + T - 1) steps (arXiv:2506.01928).
    """
    offsets_T, starts_P = np.arange(segment_length), np.arange(segments_per_group) * segment_length
    one_group = (offsets_T[:, None] + starts_P).reshape(-1)
    order = np.arange(num_groups)[:, None] * (segment_length * segments_per_group) + one_group
    sizes = [1] * segments_per_group + [segments_per_group] * (segment_length - 1)
    return order.reshape(-1), np.repeat(np.arange(len(sizes) * num_groups), sizes * num_groups)


def in_blocks(
    block_n: NDArray[np.int64], part_of_block: Callable[[NDArray[np.int64]], Part], num_steps: int
) -> Part:
    """Block after block, each by a plan of its own (semi-autoregressive).

    Args:
        block_n: number of the block that each unknown token is in.
        part_of_block: (int64 [m], indices of the unknown tokens of a block) -> their order and steps.
        num_steps: of a block.

    Returns:
        Order and steps.
    """
    orders, steps = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for block in np.unique(block_n):
        members = np.flatnonzero(block_n == block)
        order, step = part_of_block(members)
        orders.append(members[order])
        steps.append(block * num_steps + step)
    return np.concatenate(orders), np.concatenate(steps)
