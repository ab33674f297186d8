"""NELBO of an exported block diffusion model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dlm.diffusion.draws import Draws
from megatron_dlm.diffusion.likelihood import DiffusionLikelihood
from megatron_dlm.diffusion.noisy_then_clean import noisy_then_clean_mask
from megatron_dlm.diffusion.texts import Texts


class Likelihood(DiffusionLikelihood):
    """Predicts each block from its own masked copy and the clean blocks before it."""

    def copy(self, model: Any, texts: Texts, draws: Draws, index: int) -> tuple[Tensor, Tensor]:
        """NELBO of one noisy copy, each block masked at its own diffusion time."""
        ids_BL, real_BL = texts.ids_BL, texts.real_BL
        length, size = ids_BL.shape[1], int(self.config.block_size)
        noisy_BL, _, weight_BL, _ = self.mask(texts, draws, draws.times(index, size))
        places = torch.arange(length, device=ids_BL.device)[None]
        logits_BLV = model(
            torch.cat([noisy_BL, ids_BL], dim=1),
            position_ids=torch.cat([places, places], dim=1),
            visible_mask=noisy_then_clean_mask(length, size).dense()[0, 0].to(ids_BL.device),
            attention_mask=None if real_BL is None else torch.cat([real_BL, real_BL], dim=1),
        ).logits[:, :length]
        return (self.token_nats(logits_BLV, noisy_BL, ids_BL, None) * weight_BL).sum(1), logits_BLV
