"""Noise schedules: alpha_t falling from 1 (clean, t=0) towards 0 (noise, t=1), and its derivative in t."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Schedule = Literal["log-linear", "linear", "cosine"]
NOISE_EPSILON = 1e-3
"""alpha(1) of the log-linear schedule; fixed in the paper's code (arXiv:2602.15014)."""

_FUNCTIONS: dict[str, Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]] = {
    # arXiv:2406.07524, log-linear in sigma = -ln alpha, kept off 0 at t = 1.
    "log-linear": lambda t: (1.0 - (1.0 - NOISE_EPSILON) * t, np.full_like(t, -(1.0 - NOISE_EPSILON))),
    "linear": lambda t: (1.0 - t, np.full_like(t, -1.0)),
    # arXiv:2406.04329: 1 - cos(pi/2 (1 - t)), written so that it stays accurate where it nears 0.
    "cosine": lambda t: (
        2.0 * np.sin(np.pi / 4 * (1.0 - t)) ** 2,
        -np.pi / 2 * np.sin(np.pi / 2 * (1.0 - t)),
    ),
}


def alpha_and_slope(
    schedule: Schedule, t: NDArray[np.float64], *, alpha_0: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probability that a token is still clean at time t, and its derivative.

    Args:
        schedule: log-linear ends at alpha_0 / 1000, the others at 0.
        t: float64, any shape, in [0, 1].
        alpha_0: alpha at t = 0; below 1 in Eso-LM, whose sequential part fills what is still masked then.

    Returns:
        alpha_t and d alpha/dt, float64 of t's shape.
    """
    alpha, dalpha = _FUNCTIONS[schedule](t)
    return alpha_0 * alpha, alpha_0 * dalpha
