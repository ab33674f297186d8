"""One reverse step of absorbing-state diffusion (MDLM, arXiv:2406.07524)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dlm.sampling.categorical import draw_categorical


def absorbing_step(
    noisy_BL: Tensor, p_BLV: Tensor, alpha_t: Tensor, alpha_s: Tensor, mask_token_id: int, uniform_BLV: Tensor
) -> Tensor:
    """Tokens at time s < t: masked ones stay so or are drawn, the others are kept.

    Args:
        noisy_BL: int64 [B, L] at time t.
        p_BLV: float64 [B, L, V] prediction, 0 for the mask.
        alpha_t: [B] or one number.
        alpha_s: as alpha_t, not below it; 1 leaves nothing masked.
        mask_token_id: the absorbing state.
        uniform_BLV: float64 [B, L, V] draws in [0, 1).

    Returns:
        int64 [B, L].
    """
    alpha_t, alpha_s = (alpha.reshape(-1, 1, 1) for alpha in (alpha_t, alpha_s))
    weights_BLV = (alpha_s - alpha_t) * p_BLV
    weights_BLV[..., mask_token_id] = (1.0 - alpha_s)[..., 0]
    drawn_BL = draw_categorical(weights_BLV, uniform_BLV)
    return torch.where(noisy_BL == mask_token_id, drawn_BL, noisy_BL)
