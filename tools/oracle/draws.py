"""The published code's way of drawing, with which its recorded draws give its recorded tokens.

The samplers of this package draw by the sums of the weights instead: the same law from one number a row.
"""

from __future__ import annotations

import numpy as np

from tools.oracle.noise import Array

GUARD = 1e-10
"""Keeps logarithms finite."""


def exponential_race(weights: Array, uniform: Array) -> Array:
    """The id that wins w_v / -ln(u_v).

    Args:
        weights: [..., V], at least 0.
        uniform: [..., V] draws in [0, 1).

    Returns:
        int64 [...].
    """
    return (weights / (GUARD - np.log(uniform + GUARD))).argmax(axis=-1)
