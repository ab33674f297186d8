"""NELBO of an exported model with mask and uniform noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dlm.diffusion.divergence_likelihood import DivergenceLikelihood
from megatron_dlm.diffusion.draws import Draws
from megatron_dlm.diffusion.likelihood import cross_entropy_nats
from megatron_dlm.diffusion.texts import Texts
from megatron_dlm.families.mask_uniform.noise import MaskUniformNoise
from megatron_dlm.families.mask_uniform.rows import MixtureRows


class Likelihood(DivergenceLikelihood):
    """The divergence derived in `rows.py`, with the weights given there."""

    @property
    def _noise(self) -> MaskUniformNoise:
        config = self.config
        return MaskUniformNoise(config.vocab_size, config.mask_token_id, config.uniform_share)

    def rows(self, alpha_L: Tensor, q: Tensor, noisy_L: Tensor, clean_L: Tensor) -> MixtureRows:
        """Per-position terms of the divergence for mask and uniform noise."""
        noise = self._noise
        masked_L = noisy_L == noise.mask_token_id
        return MixtureRows.of(alpha_L, q, noise.probability, noisy_L == clean_L, masked_L)

    def token_nats(
        self, logits_BLV: Tensor, noisy_BL: Tensor, clean_BL: Tensor, sigma_B: Tensor | None
    ) -> Tensor:
        """The divergence in nats; the cross-entropy if the noise is the mask alone."""
        if not self.config.uniform_share:
            return cross_entropy_nats(logits_BLV, clean_BL)
        return super().token_nats(logits_BLV, noisy_BL, clean_BL, sigma_B)

    def copy(self, model: Any, texts: Texts, draws: Draws, index: int) -> tuple[Tensor, Tensor]:
        """NELBO of one noisy copy, tokens replaced by mask and uniform noise at one diffusion time."""
        noise = self._noise
        alpha_B1, slope_B1 = self.alpha_and_slope(draws.times(index))
        drawn_BL = noise.draw(draws.uniform())
        replaced_BL = (draws.uniform() < 1 - alpha_B1) & texts.scored_BL
        noisy_BL = torch.where(replaced_BL, drawn_BL, texts.ids_BL)
        sigma_B = -alpha_B1[:, 0].log()
        sigma = sigma_B.float() if self.config.time_conditioning else None
        logits_BLV = model(noisy_BL, sigma=sigma, attention_mask=texts.real_BL).logits
        rate_B1 = -slope_B1 / alpha_B1
        weight_BL = torch.where(
            noisy_BL == noise.mask_token_id, -slope_B1 / (1 - alpha_B1), rate_B1 * noise.probability
        )
        nats_BL = self.token_nats(logits_BLV, noisy_BL, texts.ids_BL, sigma_B)
        return (nats_BL * weight_BL * texts.scored_BL).sum(1), logits_BLV
