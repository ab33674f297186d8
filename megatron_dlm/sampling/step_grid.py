"""Grids of the samplers: diffusion times with their noise levels, and blocks of unknown tokens."""

from __future__ import annotations

import numpy as np
from torch import Tensor

LAST_TIME = 1e-5
"""Last time of the grid before the final step to 0, which removes the remaining noise (arXiv:2602.15014)."""


def times(num_steps: int) -> list[float]:
    """Diffusion times: a linear grid of `num_steps` + 1 times from 1 to `LAST_TIME`, followed by 0."""
    return [*np.linspace(1.0, LAST_TIME, num_steps + 1).tolist(), 0.0]


def noise_level(alpha_B: Tensor) -> Tensor:
    """Noise level sigma = -ln(alpha), float32 from float64 [B]; finite even if a schedule ends at alpha 0."""
    return -alpha_B.clamp_min(1e-9).log().float()


def blocks_of(count: int, block_length: int | None) -> list[slice]:
    """`count` unknown tokens cut into blocks from the left; one block where no length is given."""
    size = block_length or max(1, count)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
