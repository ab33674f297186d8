"""Mask and uniform noise: draws from pi, which is share / V at each id, plus 1 - share at the mask.

pi does not depend on the time, so a token at time t is clean with probability alpha and a draw from pi
otherwise, and no text is noisier than one of draws from pi.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskUniformNoise:
    """Noise distribution pi over the token ids."""

    vocab_size: int
    """V, mask token included."""
    mask_token_id: int
    uniform_share: float
    """Probability that a draw is uniform over all V ids; otherwise it is the mask."""

    @property
    def probability(self) -> float:
        """Probability pi of any single id other than the mask."""
        return self.uniform_share / self.vocab_size

    def draw(self, uniform: Tensor) -> Tensor:
        """Ids from draws in [0, 1), of any shape."""
        if not self.uniform_share:
            return torch.full_like(uniform, self.mask_token_id, dtype=torch.int64)
        # Below the share what is left of the draw is uniform again.
        ids = (uniform / self.uniform_share * self.vocab_size).long()
        return torch.where(uniform < self.uniform_share, ids, self.mask_token_id)

    def inverse_probability(self, ids: Tensor) -> Tensor:
        """1 / pi of each id, float64 in the shape of `ids`; infinite for ids that the noise never draws."""
        at_mask = torch.tensor(1.0 / (self.probability + 1.0 - self.uniform_share), dtype=torch.float64)
        elsewhere = self.vocab_size / self.uniform_share if self.uniform_share else float("inf")
        return torch.where(ids == self.mask_token_id, at_mask.to(ids.device), elsewhere)
