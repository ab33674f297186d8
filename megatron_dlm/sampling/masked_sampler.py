"""Samplers of masked families: they start from mask tokens and unmask each token once.

Shape legend: B sequences, L tokens, n unknown tokens of one sequence, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_dlm.sampling.categorical import Sharpening
from megatron_dlm.sampling.decoding_plan import Plan
from megatron_dlm.sampling.family_sampler import FamilySampler, OnStep
from megatron_dlm.sampling.kv_reader import Reader, WholeText
from megatron_dlm.sampling.network import Network
from megatron_dlm.sampling.noise import SampleNoise
from megatron_dlm.sampling.schedules import plan
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.step_grid import times
from megatron_dlm.sampling.unmasking import Unmasking


@dataclass(frozen=True, kw_only=True)
class MaskedSampler(FamilySampler):
    """Unmasks tokens, by a plan drawn beforehand or by the network's confidence."""

    def alphas(self, num_steps: int) -> list[float]:
        """Alpha at the edges of the ancestral sampler's steps.

        Args:
            num_steps: denoising steps of the sampler.

        Returns:
            num_steps + 1 or more values, from noise to data, non-decreasing.
        """
        return [self.alpha(t) for t in times(num_steps)]

    def block_of(self, unknown_n: NDArray[np.int64], config: SamplingConfig) -> NDArray[np.int64] | None:
        """The blocks that ancestral sampling unmasks one after the other.

        Args:
            unknown_n: int64 [n], positions of the unknown tokens.
            config: resolved sampler settings.

        Returns:
            int64 [n], the index of each token's block; None if all tokens are one block.
        """
        if config.block_length is None:
            return None
        blocks: NDArray[np.int64] = np.arange(len(unknown_n)) // config.block_length
        return blocks

    def left_to_right_steps(self, unknown_n: NDArray[np.int64]) -> NDArray[np.int64]:
        """The step at which left-to-right sampling reveals each unknown token.

        Args:
            unknown_n: int64 [n], positions of the unknown tokens.

        Returns:
            int64 [n], never falling.
        """
        return np.arange(len(unknown_n))

    def reader(self, network: Network, config: SamplingConfig, order: Plan) -> Reader:
        """Reader that runs the network on the tokens a plan unmasks.

        Args:
            network: trained network.
            config: resolved sampler settings.
            order: decoding plan of the batch.

        Returns:
            By default a reader of whole texts, with each step's noise level if the network takes one.
        """
        return WholeText(network, **self.reading(config))

    def reading(self, config: SamplingConfig) -> dict[str, Any]:
        """Keyword arguments of `WholeText` for a sampler.

        Args:
            config: resolved sampler settings.

        Returns:
            Arguments by name.
        """
        return {}

    def fill_in(
        self,
        network: Network,
        config: SamplingConfig,
        ids_BL: Tensor,
        given_BL: Tensor,
        noise: SampleNoise,
        on_step: OnStep | None,
    ) -> None:
        """Mask all tokens that are not given, then unmask them."""
        ids_BL.masked_fill_(~given_BL, self.mask_token_id)
        sharpen = Sharpening(config.temperature, config.top_p)
        eos = self.eos_token_id if config.stop_at_eos else None
        if config.sampler == "confidence":
            reader: Reader = WholeText(network, **self.reading(config))
            unmasking = Unmasking(network, self.vocab_size, reader, sharpen, noise, eos, on_step)
            unmasking.most_confident(ids_BL, given_BL, config.num_steps or 0, config.block_length)
            return
        order = plan(config, self, given_BL.cpu().numpy(), noise)
        reader = self.reader(network, config, order)
        Unmasking(network, self.vocab_size, reader, sharpen, noise, eos, on_step).follow(
            order, ids_BL, given_BL
        )


def level_of_step(alphas: Sequence[float], step: int) -> float:
    """Alpha at the start of a step of ancestral sampling; every block runs through all noise levels anew.

    Args:
        alphas: alpha at the edges of the steps of one block.
        step: step of the sampler, counted over all blocks.

    Returns:
        Alpha at the start of the step.
    """
    return alphas[step % (len(alphas) - 1)]
