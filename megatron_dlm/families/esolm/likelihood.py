"""Eso-LM's bound on an exported model: of its diffusion part, and of its sequential one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dlm.diffusion.likelihood import DiffusionLikelihood, Draws
from megatron_dlm.diffusion.noisy_then_clean import noisy_then_clean_mask

CLEAN_KEYS = 0.9
"""Sort keys of clean tokens lie below this, those of masked ones at 1 or above, of prompts below 0."""


class Likelihood(DiffusionLikelihood):
    """Both parts of each copy, as far as alpha_0 gives them something to do."""

    @property
    def alpha_0(self) -> float:
        """Expected share of tokens made by diffusion."""
        return float(self.config.alpha_0)

    def copy(self, model: Any, ids_BL: Tensor, draws: Draws, index: int) -> Tensor:
        """The sum of the parts."""
        nats_B = torch.zeros(len(ids_BL), dtype=torch.float64, device=ids_BL.device)
        if self.alpha_0 > 0:
            nats_B += self._diffusion(model, ids_BL, draws, index)
        if self.alpha_0 < 1:
            nats_B += self._sequential(model, ids_BL, draws)
        return nats_B

    def _diffusion(self, model: Any, ids_BL: Tensor, draws: Draws, index: int) -> Tensor:
        """Masked at one time; clean tokens come first, each kind in random order."""
        noisy_BL, masked_BL, weight_BL, _ = self.mask(ids_BL, draws, draws.times(index))
        order_BL = (masked_BL + CLEAN_KEYS * draws.uniform(*ids_BL.shape)).argsort(1)
        noisy_BL, clean_BL, weight_BL = (x.gather(1, order_BL) for x in (noisy_BL, ids_BL, weight_BL))
        logits_BLV = model(noisy_BL, position_ids=order_BL).logits
        return (self.token_nats(logits_BLV, noisy_BL, clean_BL, None) * weight_BL).sum(1)

    def _sequential(self, model: Any, ids_BL: Tensor, draws: Draws) -> Tensor:
        """Masked as diffusion leaves it; each masked token from all that is before it in the order."""
        length = ids_BL.shape[1]
        masked_BL = draws.uniform(*ids_BL.shape) < 1 - self.alpha_0
        places = torch.arange(length, device=ids_BL.device)
        random_BL = CLEAN_KEYS * draws.uniform(*ids_BL.shape)
        order_BL = torch.where(masked_BL, 1.0 + places, random_BL).argsort(1)
        noisy_BL = torch.where(masked_BL, self.config.mask_token_id, ids_BL)
        noisy_BL, clean_BL, masked_BL = (x.gather(1, order_BL) for x in (noisy_BL, ids_BL, masked_BL))
        logits_BLV = model(
            torch.cat([noisy_BL, clean_BL], dim=1),
            position_ids=torch.cat([order_BL, order_BL], dim=1),
            visible_mask=noisy_then_clean_mask(length, 1).dense()[0, 0].to(ids_BL.device),
        ).logits[:, :length]
        return (self.token_nats(logits_BLV, noisy_BL, clean_BL, None) * masked_BL).sum(1)
