"""Samplers of families whose tokens become known one by one, from a text of masks.

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
    """Reveals masked tokens, by a plan made beforehand or by the network's confidence."""

    def alphas(self, num_steps: int) -> list[float]:
        """Alpha at the edges of the ancestral sampler's steps.

        Args:
            num_steps: of the sampler.

        Returns:
            From the noise to the data, not falling.
        """
        return [self.alpha(t) for t in times(num_steps)]

    def block_of(self, unknown_n: NDArray[np.int64], config: SamplingConfig) -> NDArray[np.int64] | None:
        """The blocks that ancestral sampling reveals one after the other.

        Args:
            unknown_n: int64 [n], positions of the unknown tokens.
            config: resolved.

        Returns:
            int64 [n], the number of each token's block; None where all are one.
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
        """How the network is asked for tokens that a plan reveals.

        Args:
            network: trained.
            config: resolved.
            order: of the batch.

        Returns:
            One that reads whole texts, with the noise level of each step where the network is told one.
        """
        return WholeText(network, **self.reading(config))

    def reading(self, config: SamplingConfig) -> dict[str, Any]:
        """Arguments of `WholeText` for a sampler.

        Args:
            config: resolved.

        Returns:
            By name.
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
        """Mask what is not given and reveal it."""
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
    """Alpha at which a step of ancestral sampling begins; blocks go through all of them again.

    Args:
        alphas: at the edges of the steps.
        step: of the sampler.

    Returns:
        Alpha.
    """
    return alphas[step % (len(alphas) - 1)]
