"""Samplers of the mixture: ancestral, all tokens at once or in blocks, and left to right."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.families.mask_uniform.noise import MaskUniformNoise
from megatron_dlm.sampling.replacing import ReplacingFamilySampler


@dataclass(frozen=True, kw_only=True)
class Sampler(ReplacingFamilySampler):
    """Samplers of the mixture's noise; where it is the mask alone, a token that has been filled in stays."""

    uniform_share: float
    """Probability that noise is a uniform draw instead of the mask."""

    @property
    def draws(self) -> MaskUniformNoise:
        """The mask, or any id."""
        return MaskUniformNoise(self.vocab_size, self.mask_token_id, self.uniform_share)
