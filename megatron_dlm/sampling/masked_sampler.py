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
from megatron_dlm.sampling.guidance import Guidance, Head
from megatron_dlm.sampling.kv_reader import Reader, WholeText
from megatron_dlm.sampling.network import Network
from megatron_dlm.sampling.noise import SampleNoise
from megatron_dlm.sampling.remasking import Remasking, loop_alphas, remasking_steps
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

    def levels(self, config: SamplingConfig) -> list[float]:
        """Alpha at the edges of a sampler's steps, from noise to data.

        Args:
            config: resolved settings of a sampler of the reverse process: ancestral, psi or remasking.

        Returns:
            Values that never fall; those of remasking loop have a plateau.
        """
        if config.remasking_loop is not None:
            return loop_alphas(times(config.num_steps or 0), config.remasking_loop)
        return self.alphas(config.num_steps or 0)

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

    def cached_reader(self, network: Network, order: Plan) -> Reader | None:
        """Reader with a key-value cache, for families whose network can have one.

        Args:
            network: trained network.
            order: decoding plan of the batch.

        Returns:
            The reader; None: whole texts are read.
        """
        return None

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
        head: Head = network.head
        guidance = None
        if config.guidance_scale != 1:
            guidance = Guidance(config.guidance_scale, given_BL, self.mask_token_id)
            head = guidance.head(network.head)
        whole_text = WholeText(network, **self.reading(config), guidance=guidance)
        if config.sampler in ("psi", "remasking"):
            remasking = Remasking(
                head, self.vocab_size, self.mask_token_id, whole_text, sharpen, noise, on_step
            )
            remasking.run(
                ids_BL,
                given_BL,
                remasking_steps(self.levels(config), config),
                by_confidence=config.remasking == "confidence",
                greedy_tail=config.greedy_tail,
                eos_token_id=eos,
            )
        elif config.sampler == "confidence":
            unmasking = Unmasking(head, self.vocab_size, whole_text, sharpen, noise, eos, on_step)
            if config.threshold is not None:
                unmasking.above_threshold(ids_BL, given_BL, config.threshold, config.block_length)
            else:
                unmasking.most_confident(ids_BL, given_BL, config.num_steps or 0, config.block_length)
        else:
            order = plan(config, self, given_BL.cpu().numpy(), noise)
            reader = self.cached_reader(network, order) or whole_text
            unmasking = Unmasking(head, self.vocab_size, reader, sharpen, noise, eos, on_step)
            unmasking.follow(order, ids_BL, given_BL)


def level_of_step(alphas: Sequence[float], step: int) -> float:
    """Alpha at the start of a step of ancestral sampling; every block runs through all noise levels anew.

    Args:
        alphas: alpha at the edges of the steps of one block.
        step: step of the sampler, counted over all blocks.

    Returns:
        Alpha at the start of the step.
    """
    return alphas[step % (len(alphas) - 1)]
