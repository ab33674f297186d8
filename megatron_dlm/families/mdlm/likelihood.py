"""NELBO of an exported MDLM model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_dlm.diffusion.draws import Draws
from megatron_dlm.diffusion.likelihood import DiffusionLikelihood
from megatron_dlm.diffusion.texts import Texts


class Likelihood(DiffusionLikelihood):
    """Predicts masked tokens from the unmasked ones."""

    def copy(self, model: Any, texts: Texts, draws: Draws, index: int) -> tuple[Tensor, Tensor]:
        """NELBO of one noisy copy, masked at one diffusion time."""
        # Exports made before there was such a choice do not say.
        shift = getattr(self.config, "shift", False)
        if shift:
            texts = texts.without_first()
        noisy_BL, _, weight_BL, alpha_B1 = self.mask(texts, draws, draws.times(index))
        sigma_B = -alpha_B1[:, 0].log().float() if self.config.time_conditioning else None
        logits_BLV = model(noisy_BL, sigma=sigma_B, attention_mask=texts.real_BL).logits
        # The first token, which has no position before it, has no weight.
        predicted_BLV = logits_BLV.roll(1, dims=1) if shift else logits_BLV
        nats_BL = self.token_nats(predicted_BLV, noisy_BL, texts.ids_BL, sigma_B)
        return (nats_BL * weight_BL).sum(1), logits_BLV
