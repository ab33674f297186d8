"""Decoding plans: the order and the step at which masked tokens are unmasked, drawn before any forward pass.

The order of ancestral sampling does not depend on the predicted tokens, so it can be drawn beforehand: a
step that unmasks nothing in a sequence costs nothing, and a causal network gets its token order.
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
"""Step number that marks given (prompt) tokens."""
Part = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Order (int64 [n], indices of unknown tokens) and the step of each entry (int64 [n], non-decreasing)."""


@dataclass
class Plan:
    """Unmasking order and steps of a batch."""

    order_BL: Tensor
    """int64 [B, L], all positions in the order in which they become known; given ones first."""
    step_BL: Tensor
    """int64 [B, L], the step of each entry of the order; GIVEN for given ones."""

    def __post_init__(self) -> None:
        self.num_steps = int(self.step_BL.max()) + 1
        self.step_at_BL = torch.empty_like(self.step_BL).scatter_(1, self.order_BL, self.step_BL)
        """The step at which each position is revealed."""


def plan_of(given_BL: NDArray[np.bool_], part_of_row: Callable[[int, NDArray[np.int64]], Part]) -> Plan:
    """Combine the plans of single sequences into the plan of a batch.

    Args:
        given_BL: bool [B, L], True where a token is given.
        part_of_row: function from (row, int64 [n] positions of its unknown tokens) to their order and steps.

    Returns:
        Plan of the batch.
    """
    orders, steps = [], []
    for row, given in enumerate(given_BL):
        unknown, known = np.flatnonzero(~given), np.flatnonzero(given)
        order, step = part_of_row(row, unknown)
        orders.append(np.concatenate([known, unknown[order]]))
        steps.append(np.concatenate([np.full(len(known), GIVEN), step]))
    return Plan(torch.from_numpy(np.stack(orders)), torch.from_numpy(np.stack(steps)))


def reveal_shares(alphas: Sequence[float]) -> NDArray[np.float64]:
    """Share of the masked tokens that each step of the reverse process unmasks.

    Absorbing-state posterior (arXiv:2406.07524, equation 7): (alpha_s - alpha_t) / (1 - alpha_t).

    Args:
        alphas: alpha at the steps' edges, from noise to clean, non-decreasing.

    Returns:
        float64 [len(alphas) - 1] shares in [0, 1].
    """
    edges = np.asarray(alphas, dtype=np.float64)
    # Rounding may carry the last share of a schedule that ends at 1 above it.
    return np.minimum(1.0, np.diff(edges) / (1.0 - edges[:-1]))


def ancestral_part(uniform_n: NDArray[np.float64], shares_T: NDArray[np.float64]) -> Part:
    """Plan of ancestral sampling: each token draws its step of the reverse process, the rest left to right.

    Args:
        uniform_n: float64 [n] draws in [0, 1).
        shares_T: float64 [T], share of the masked tokens that each step unmasks.

    Returns:
        Order and steps. Tokens of one step are in random order; tokens that no step unmasks (Eso-LM at
        alpha_0 < 1, arXiv:2506.01928) follow, one per step.
    """
    revealed_by_T = 1.0 - np.cumprod(1.0 - shares_T)
    steps = np.searchsorted(revealed_by_T, uniform_n, side="right")
    order = np.argsort(uniform_n, kind="stable")
    diffused = int((steps < len(shares_T)).sum())
    order = np.concatenate([order[:diffused], np.sort(order[diffused:])])
    left_over = len(shares_T) + np.arange(len(order) - diffused)
    return order, np.concatenate([steps[order[:diffused]], left_over])


def block_part(uniform_T: NDArray[np.float64], tokens_per_step: int) -> Part:
    """Plan of T steps that each unmask P tokens, T positions apart, offsets shuffled (arXiv:2506.01928).

    Args:
        uniform_T: float64 [T] draws in [0, 1), T the number of steps.
        tokens_per_step: P tokens unmasked per step; P T tokens in all.

    Returns:
        Order and steps of P T tokens.
    """
    num_steps = len(uniform_T)
    offsets_T = np.argsort(uniform_T, kind="stable")
    order_TP = offsets_T[:, None] + np.arange(tokens_per_step) * num_steps
    return order_TP.reshape(-1), np.repeat(np.arange(num_steps), tokens_per_step)


def block_autoregressive_part(segment_length: int, num_groups: int, segments_per_group: int) -> Part:
    """Plan by groups: each group's segments get their first tokens one by one, then the rest in parallel.

    Args:
        segment_length: T tokens per segment.
        num_groups: S groups.
        segments_per_group: P segments per group; S P T tokens in all.

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
    """Semi-autoregressive plan: blocks one after the other, each by its own plan.

    Args:
        block_n: int64 [n], index of the block that each unknown token is in.
        part_of_block: function from int64 [m] indices of a block's unknown tokens to their order and steps.
        num_steps: denoising steps per block.

    Returns:
        Order and steps of all unknown tokens.
    """
    orders, steps = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for block in np.unique(block_n):
        members = np.flatnonzero(block_n == block)
        order, step = part_of_block(members)
        orders.append(members[order])
        steps.append(block * num_steps + step)
    return np.concatenate(orders), np.concatenate(steps)
