"""Exact likelihood of an autoregressive model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_dlm.diffusion.likelihood import FamilyLikelihood


class Likelihood(FamilyLikelihood):
    """Scores tokens 1 to L - 1, each given all tokens before it."""

    def estimate(
        self, model: Any, ids_BL: Tensor, num_samples: int, seed: int, t_grid: Sequence[float] | None
    ) -> Tensor:
        """Exact NLL in nats; no noise is drawn, so the sampling arguments have no effect."""
        seen_BL = ids_BL[:, :-1]
        return self.token_nats(model(seen_BL).logits, seen_BL, ids_BL[:, 1:], None).sum(1)
