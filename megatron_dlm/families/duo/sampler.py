"""Duo's samplers: ancestral, all tokens at once or in blocks, and left to right."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dlm.diffusion.uniform_states import UniformStates
from megatron_dlm.sampling.replacing import ReplacingFamilySampler


@dataclass(frozen=True, kw_only=True)
class Sampler(ReplacingFamilySampler):
    """Samplers of uniform noise: every token may change in every step."""

    mask_in_noise: bool = True
    """Whether uniform noise draws the mask token too."""

    @property
    def draws(self) -> UniformStates:
        """Uniform noise over all states."""
        return UniformStates(self.vocab_size, self.mask_token_id, mask_in_noise=self.mask_in_noise)
