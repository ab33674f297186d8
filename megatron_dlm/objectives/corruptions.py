"""Forward processes: how clean tokens become noisy ones. Pure functions of their draws."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def absorb(
    clean_BL: NDArray[np.int64],
    alpha_B: NDArray[np.float64],
    uniform_BL: NDArray[np.float64],
    mask_token_id: int,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Absorbing-state corruption: each token independently becomes the mask with probability 1 - alpha.

    Args:
        clean_BL: int64 [B, L].
        alpha_B: float64 [B], probability that a token stays clean.
        uniform_BL: float64 [B, L] draws in [0, 1).
        mask_token_id: the absorbing state.

    Returns:
        int64 [B, L] noisy tokens, and bool [B, L] where they are masked.
    """
    masked_BL = uniform_BL < 1.0 - alpha_B[:, None]
    return np.where(masked_BL, mask_token_id, clean_BL), masked_BL
