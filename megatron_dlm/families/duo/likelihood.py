"""Duo's bound on an exported model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dlm.diffusion.likelihood import DiffusionLikelihood, Draws
from megatron_dlm.diffusion.uniform_divergence_rows import UniformRows
from megatron_dlm.diffusion.uniform_states import UniformStates


class Likelihood(DiffusionLikelihood):
    """Every token from all others and the noise level."""

    @property
    def _states(self) -> UniformStates:
        config = self.config
        return UniformStates(config.vocab_size, config.mask_token_id, mask_in_noise=config.mask_in_noise)

    def token_nats(
        self, logits_BLV: Tensor, noisy_BL: Tensor, clean_BL: Tensor, sigma_B: Tensor | None
    ) -> Tensor:
        """The divergence of arXiv:2506.10892, to be weighted by -alpha' / (K alpha)."""
        assert sigma_B is not None
        rows = zip(logits_BLV, noisy_BL, clean_BL, sigma_B.double(), strict=True)
        return torch.stack([self._sequence_nats(*row) for row in rows])

    def _sequence_nats(self, logits_LV: Tensor, noisy_L: Tensor, clean_L: Tensor, sigma: Tensor) -> Tensor:
        """float64 [L]; one sequence at a time, since [B, L, V] in float64 may be too much."""
        p_LV = logits_LV.double().softmax(-1)
        alpha_L = (-sigma).exp().expand(len(noisy_L))
        row = UniformRows.of(self._states.count, alpha_L, -(-sigma).expm1(), noisy_L == clean_L)
        # An id that is no state has probability 0 and adds nothing.
        s_L = torch.log1p(p_LV * row.r[:, None]).sum(-1)
        p_noisy_L, p_clean_L = (p_LV.gather(1, ids[:, None])[:, 0] for ids in (noisy_L, clean_L))
        return row.loss(s_L, p_noisy_L, p_clean_L)

    def copy(self, model: Any, ids_BL: Tensor, draws: Draws, index: int) -> Tensor:
        """Replaced at one time."""
        alpha_B1, slope_B1 = self.alpha_and_slope(draws.times(index))
        drawn_BL = self._states.token(draws.integers(self._states.count))
        noisy_BL = torch.where(draws.uniform(*ids_BL.shape) < 1 - alpha_B1, drawn_BL, ids_BL)
        sigma_B = -alpha_B1[:, 0].log()
        logits_BLV = model(noisy_BL, sigma=sigma_B.float()).logits
        weight_B1 = -slope_B1 / (self._states.count * alpha_B1)
        return (self.token_nats(logits_BLV, noisy_BL, ids_BL, sigma_B) * weight_B1).sum(1)
