"""Samplers of the mixture: ancestral, all tokens at once or in blocks, and left to right."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.families.mask_uniform.noise import MaskUniformNoise
from megatron_dlm.sampling.replacing import ReplacingFamilySampler


@dataclass(frozen=True, kw_only=True)
class Sampler(ReplacingFamilySampler):
    """Samplers for mask and uniform noise; if noise is the mask alone, an unmasked token stays."""

    uniform_share: float
    """Probability that noise is a uniform draw instead of the mask."""

    @property
    def draws(self) -> MaskUniformNoise:
        """The noise: the mask token, or a uniform draw over all ids."""
        return MaskUniformNoise(self.vocab_size, self.mask_token_id, self.uniform_share)
