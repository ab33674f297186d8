"""Noise schedules: alpha_t falling from 1 (clean, t=0) towards 0 (noise, t=1), and its derivative."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NOISE_EPSILON = 1e-3
"""alpha(1) of the log-linear schedule; fixed in the paper's code (arXiv:2602.15014)."""


def log_linear_alpha(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """alpha_t = 1 - (1 - epsilon) t, for t in [0, 1] (arXiv:2406.07524, log-linear schedule)."""
    return 1.0 - (1.0 - NOISE_EPSILON) * t


def log_linear_dalpha(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """The derivative of alpha_t in t: the constant -(1 - epsilon)."""
    return np.full_like(t, -(1.0 - NOISE_EPSILON))
