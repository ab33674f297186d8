"""Exact likelihood of an autoregressive model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_dlm.diffusion.likelihood import FamilyLikelihood
from megatron_dlm.diffusion.texts import Texts


class Likelihood(FamilyLikelihood):
    """Scores the tokens behind the first, each given all tokens before it."""

    unread_tokens: ClassVar = 1

    def estimate(
        self, model: Any, texts: Texts, num_samples: int, seed: int, t_grid: Sequence[float] | None
    ) -> Tensor:
        """Exact NLL in nats; no noise is drawn, so the sampling arguments have no effect."""
        return self._nats(model(texts.ids_BL[:, :-1]).logits, texts)

    def one_draw(self, model: Any, texts: Texts) -> tuple[Tensor, Tensor]:
        """Exact NLL in nats."""
        logits_BLV = model(texts.ids_BL).logits
        return self._nats(logits_BLV[:, :-1], texts), logits_BLV

    def _nats(self, logits_BLV: Tensor, texts: Texts) -> Tensor:
        """Sum over the scored tokens; padding is behind them, so that none sees it."""
        nats_BL = self.token_nats(logits_BLV, texts.ids_BL[:, :-1], texts.ids_BL[:, 1:], None)
        return torch.where(texts.scored_BL[:, 1:], nats_BL, 0.0).sum(1)
