"""One reverse step of uniform-state diffusion (Duo, arXiv:2506.10892)."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_posterior(
    noisy_BL: Tensor, p_BLV: Tensor, alpha_t: Tensor, alpha_s: Tensor, states_V: Tensor
) -> Tensor:
    """q(z_s | z_t, prediction).

    Args:
        noisy_BL: int64 [B, L] at time t.
        p_BLV: float64 [B, L, V] prediction.
        alpha_t: [B] or one number, above 0.
        alpha_s: as alpha_t, not below it; 1 gives the last step.
        states_V: bool [V], the ids that the noise draws from.

    Returns:
        float64 [B, L, V], each row adding up to 1.
    """
    alpha_t, alpha_s = (alpha.reshape(-1, 1, 1) for alpha in (alpha_t, alpha_s))
    count = states_V.sum()
    ratio = alpha_t / alpha_s
    seen_BL1 = p_BLV.gather(-1, noisy_BL[..., None])
    posterior = (alpha_s - alpha_t) * p_BLV + (1.0 - ratio) * (1.0 - alpha_s) / count * states_V
    stays = count * alpha_t * seen_BL1 + ratio - alpha_t
    posterior.scatter_add_(-1, noisy_BL[..., None], stays)
    return posterior / (count * alpha_t * seen_BL1 + 1.0 - alpha_t)


def noise_states(vocabulary_size: int, mask_token_id: int, *, mask_in_noise: bool) -> Tensor:
    """Bool [V], the ids that uniform noise draws from."""
    states = torch.ones(vocabulary_size, dtype=torch.bool)
    states[mask_token_id] = mask_in_noise
    return states
