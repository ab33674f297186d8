"""AR's likelihood, which is exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_dlm.diffusion.likelihood import FamilyLikelihood


class Likelihood(FamilyLikelihood):
    """Tokens 1 to L - 1, each given those before it."""

    def estimate(
        self, model: Any, ids_BL: Tensor, num_samples: int, seed: int, t_grid: Sequence[float] | None
    ) -> Tensor:
        """Nothing is drawn."""
        seen_BL = ids_BL[:, :-1]
        return self.token_nats(model(seen_BL).logits, seen_BL, ids_BL[:, 1:], None).sum(1)
