"""Samplers of the mixture: ancestral, all tokens at once or in blocks, and left to right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatron_dlm.families.mask_uniform.noise import MaskUniformNoise
from megatron_dlm.sampling.categorical import Sharpening
from megatron_dlm.sampling.family_sampler import FamilySampler, OnStep
from megatron_dlm.sampling.network import Network
from megatron_dlm.sampling.noise import SampleNoise
from megatron_dlm.sampling.replacing import ReplacingSampler
from megatron_dlm.sampling.schedules import times
from megatron_dlm.sampling.settings import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Sampler(FamilySampler):
    """Every token may change in every step, unless noise is the mask alone."""

    samplers: ClassVar = {
        "ancestral": ("num_steps", "block_length", "greedy_tail"),
        "left-to-right": ("greedy_tail",),
    }

    uniform_share: float
    """Probability that noise is a uniform draw instead of the mask."""

    def fill_in(
        self,
        network: Network,
        config: SamplingConfig,
        ids_BL: Tensor,
        given_BL: Tensor,
        noise: SampleNoise,
        on_step: OnStep | None,
    ) -> None:
        """Begin with noise; left to right is a step from noise to data for each token."""
        one_by_one = config.sampler == "left-to-right"
        draws = MaskUniformNoise(self.vocab_size, self.mask_token_id, self.uniform_share)
        sharpen = Sharpening(config.temperature, config.top_p)
        ReplacingSampler(network, self.alpha, draws, self.vocab_size, sharpen, noise, on_step).run(
            ids_BL,
            given_BL,
            [1.0, 0.0] if one_by_one else times(config.num_steps or 0),
            1 if one_by_one else config.block_length,
            greedy_tail=config.greedy_tail,
            eos_token_id=self.eos_token_id if config.stop_at_eos else None,
        )
