"""Token losses of an exported model for families whose loss is a divergence of jump rates (uniform noise).

Shape legend: B sequences, L tokens, V ids.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from megatron_dlm.diffusion.likelihood import DiffusionLikelihood


class CostRows(Protocol):
    """The part of `DivergenceRows` (diffusion/divergence.py) that the loss alone needs."""

    @property
    def r(self) -> Tensor:
        """Factor r of p_v in S = sum_v ln(1 + r p_v); float64 [L], at least 0."""

    def loss(self, s_R: Tensor, p_noisy_R: Tensor, p_clean_R: Tensor) -> Tensor:
        """Loss, float64 [L], from S and the predicted probabilities of the noisy and the clean token."""


class DivergenceLikelihood(DiffusionLikelihood):
    """Scores every token, predicted from the whole noisy sequence and the noise level."""

    @abstractmethod
    def rows(self, alpha_L: Tensor, q: Tensor, noisy_L: Tensor, clean_L: Tensor) -> CostRows:
        """Coefficients of the loss at each position of one sequence.

        Args:
            alpha_L: float64 [L], probability that a token is clean.
            q: float64, 1 - alpha computed without cancellation.
            noisy_L: int64 [L], noisy token ids.
            clean_L: int64 [L], clean token ids.

        Returns:
            The rows' coefficients.
        """

    def token_nats(
        self, logits_BLV: Tensor, noisy_BL: Tensor, clean_BL: Tensor, sigma_B: Tensor | None
    ) -> Tensor:
        """The divergence in nats, before the family's weight."""
        assert sigma_B is not None
        rows = zip(logits_BLV, noisy_BL, clean_BL, sigma_B.double(), strict=True)
        return torch.stack([self._sequence_nats(*row) for row in rows])

    def _sequence_nats(self, logits_LV: Tensor, noisy_L: Tensor, clean_L: Tensor, sigma: Tensor) -> Tensor:
        """float64 [L]; one sequence at a time, since [B, L, V] in float64 may be too much."""
        p_LV = logits_LV.double().softmax(-1)
        rows = self.rows((-sigma).exp().expand(len(noisy_L)), -(-sigma).expm1(), noisy_L, clean_L)
        # An id that is never predicted has probability 0 and adds nothing.
        s_L = torch.log1p(p_LV * rows.r[:, None]).sum(-1)
        p_noisy_L, p_clean_L = (p_LV.gather(1, ids[:, None])[:, 0] for ids in (noisy_L, clean_L))
        return rows.loss(s_L, p_noisy_L, p_clean_L)
