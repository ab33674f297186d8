"""NELBO of an exported MDLM model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_dlm.diffusion.likelihood import DiffusionLikelihood, Draws


class Likelihood(DiffusionLikelihood):
    """Predicts masked tokens from the unmasked ones."""

    def copy(self, model: Any, ids_BL: Tensor, draws: Draws, index: int) -> Tensor:
        """NELBO of one noisy copy, masked at one diffusion time."""
        noisy_BL, _, weight_BL, alpha_B1 = self.mask(ids_BL, draws, draws.times(index))
        sigma_B = -alpha_B1[:, 0].log().float() if self.config.time_conditioning else None
        logits_BLV = model(noisy_BL, sigma=sigma_B).logits
        return (self.token_nats(logits_BLV, noisy_BL, ids_BL, sigma_B) * weight_BL).sum(1)
