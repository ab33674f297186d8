"""Forward processes: how clean tokens become noisy tokens, as functions of given random draws."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.interfaces import TokenBatch


def absorb(
    clean_BL: NDArray[np.int64],
    alpha_BL: NDArray[np.float64],
    uniform_BL: NDArray[np.float64],
    mask_token_id: int,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Absorbing-state corruption: each token independently becomes the mask with probability 1 - alpha.

    Args:
        clean_BL: int64 [B, L].
        alpha_BL: float64 [B, L] or [B, 1], probability that a token stays clean.
        uniform_BL: float64 [B, L] draws in [0, 1).
        mask_token_id: the absorbing state.

    Returns:
        int64 [B, L] noisy tokens, and bool [B, L], True where a token is masked.
    """
    masked_BL = uniform_BL < 1.0 - alpha_BL
    return np.where(masked_BL, mask_token_id, clean_BL), masked_BL


def replace_uniformly(
    clean_BL: NDArray[np.int64],
    alpha_BL: NDArray[np.float64],
    uniform_BL: NDArray[np.float64],
    drawn_BL: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Uniform-state corruption: with probability 1 - alpha a token is replaced, perhaps by the same id.

    Args:
        clean_BL: int64 [B, L].
        alpha_BL: float64 [B, L] or [B, 1], probability that a token stays clean.
        uniform_BL: float64 [B, L] draws in [0, 1).
        drawn_BL: int64 [B, L] uniform draws over the states of the noise.

    Returns:
        int64 [B, L] noisy tokens.
    """
    return np.where(uniform_BL < 1.0 - alpha_BL, drawn_BL, clean_BL)


def coins(batch: TokenBatch, context: CorruptionContext, stream: str, length: int) -> NDArray[np.float64]:
    """Uniform draws that decide which tokens become noise: those whose draw is below 1 - alpha.

    Args:
        batch: clean token blocks.
        context: address of the random draws.
        stream: name of the random stream.
        length: tokens per sample after truncation.

    Returns:
        float64 [B, length] in [0, 1), and 1 at tokens that are never noised, which no probability exceeds.
    """
    uniform_BL = context.noise.uniform(stream, batch.sample_indices, length)
    return np.where(noised_tokens(batch, length), uniform_BL, 1.0)


def noised_tokens(batch: TokenBatch, length: int) -> NDArray[np.bool_]:
    """Mask of the tokens that may become noise: all but prompts and padding.

    Args:
        batch: clean token blocks.
        length: tokens per sample after truncation.

    Returns:
        bool [B, length], True where a token may become noise.
    """
    if batch.loss_mask is None:
        return np.ones((len(batch.sample_indices), length), dtype=np.bool_)
    mask_BL: NDArray[np.bool_] = batch.loss_mask[:, :length].numpy()
    return mask_BL
