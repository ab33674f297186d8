"""The mixture's bound on an exported model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dlm.diffusion.likelihood import DiffusionLikelihood, Draws
from megatron_dlm.families.mask_uniform.noise import MaskUniformNoise
from megatron_dlm.families.mask_uniform.rows import MixtureRows


class Likelihood(DiffusionLikelihood):
    """Every token from all others and the noise level."""

    @property
    def _noise(self) -> MaskUniformNoise:
        config = self.config
        return MaskUniformNoise(config.vocab_size, config.mask_token_id, config.uniform_share)

    def token_nats(
        self, logits_BLV: Tensor, noisy_BL: Tensor, clean_BL: Tensor, sigma_B: Tensor | None
    ) -> Tensor:
        """The divergence of `rows.py`, to be weighted as it says; with masks alone the cross-entropy."""
        if not self.config.uniform_share:
            return super().token_nats(logits_BLV, noisy_BL, clean_BL, sigma_B)
        assert sigma_B is not None
        rows = zip(logits_BLV, noisy_BL, clean_BL, sigma_B.double(), strict=True)
        return torch.stack([self._sequence_nats(*row) for row in rows])

    def _sequence_nats(self, logits_LV: Tensor, noisy_L: Tensor, clean_L: Tensor, sigma: Tensor) -> Tensor:
        """float64 [L]; one sequence at a time, since [B, L, V] in float64 may be too much."""
        p_LV = logits_LV.double().softmax(-1)
        alpha_L, q = (-sigma).exp().expand(len(noisy_L)), -(-sigma).expm1()
        noise = self._noise
        rows = MixtureRows.of(
            alpha_L, q, noise.probability, noisy_L == clean_L, noisy_L == noise.mask_token_id
        )
        s_L = torch.log1p(p_LV * rows.r[:, None]).sum(-1)
        p_noisy_L, p_clean_L = (p_LV.gather(1, ids[:, None])[:, 0] for ids in (noisy_L, clean_L))
        return rows.loss(s_L, p_noisy_L, p_clean_L)

    def copy(self, model: Any, ids_BL: Tensor, draws: Draws, index: int) -> Tensor:
        """Replaced at one time."""
        noise = self._noise
        alpha_B1, slope_B1 = self.alpha_and_slope(draws.times(index))
        drawn_BL = noise.draw(draws.uniform(*ids_BL.shape))
        noisy_BL = torch.where(draws.uniform(*ids_BL.shape) < 1 - alpha_B1, drawn_BL, ids_BL)
        sigma_B = -alpha_B1[:, 0].log()
        logits_BLV = model(noisy_BL, sigma=sigma_B.float() if self.config.time_conditioning else None).logits
        rate_B1 = -slope_B1 / alpha_B1
        weight_BL = torch.where(
            noisy_BL == noise.mask_token_id, -slope_B1 / (1 - alpha_B1), rate_B1 * noise.probability
        )
        return (self.token_nats(logits_BLV, noisy_BL, ids_BL, sigma_B) * weight_BL).sum(1)
