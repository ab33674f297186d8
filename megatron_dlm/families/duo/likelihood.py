"""NELBO of an exported Duo model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dlm.diffusion.divergence_likelihood import DivergenceLikelihood
from megatron_dlm.diffusion.draws import Draws
from megatron_dlm.diffusion.texts import Texts
from megatron_dlm.diffusion.uniform_divergence_rows import UniformRows
from megatron_dlm.diffusion.uniform_states import UniformStates


class Likelihood(DivergenceLikelihood):
    """The divergence of arXiv:2506.10892, weighted by -alpha' / (K alpha)."""

    @property
    def _states(self) -> UniformStates:
        config = self.config
        return UniformStates(config.vocab_size, config.mask_token_id, mask_in_noise=config.mask_in_noise)

    def rows(self, alpha_L: Tensor, q: Tensor, noisy_L: Tensor, clean_L: Tensor) -> UniformRows:
        """Per-position terms of the divergence for uniform noise."""
        return UniformRows.of(self._states.count, alpha_L, q, noisy_L == clean_L)

    def copy(self, model: Any, texts: Texts, draws: Draws, index: int) -> tuple[Tensor, Tensor]:
        """NELBO of one noisy copy, tokens replaced by uniform noise at one diffusion time."""
        alpha_B1, slope_B1 = self.alpha_and_slope(draws.times(index))
        drawn_BL = self._states.token(draws.integers(self._states.count))
        replaced_BL = (draws.uniform() < 1 - alpha_B1) & texts.scored_BL
        noisy_BL = torch.where(replaced_BL, drawn_BL, texts.ids_BL)
        sigma_B = -alpha_B1[:, 0].log()
        logits_BLV = model(noisy_BL, sigma=sigma_B.float(), attention_mask=texts.real_BL).logits
        weight_BL = texts.scored_BL * -slope_B1 / (self._states.count * alpha_B1)
        nats_BL = self.token_nats(logits_BLV, noisy_BL, texts.ids_BL, sigma_B)
        return (nats_BL * weight_BL).sum(1), logits_BLV
