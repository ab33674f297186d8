"""Runs the sampler of a family.

Shape legend: B sequences, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dlm.sampling.family_sampler import FamilySampler, OnStep
from megatron_dlm.sampling.network import Network
from megatron_dlm.sampling.noise import SampleNoise
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.start import Start, check_tokens


@torch.no_grad()
def sample(
    network: Network,
    family: FamilySampler,
    config: SamplingConfig,
    start: Start,
    *,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Fill in the tokens that are not given.

    A sample depends on the seed and its index, not on the rest of the batch.

    Args:
        network: trained network.
        family: samplers of the network's family.
        config: settings of the sampler.
        start: prompts or other given tokens of the batch.
        seed: random seed of all draws.
        samples: index of each sequence, which addresses its draws; None: 0 to B - 1.
        on_step: called after each step with the step and the tokens so far.

    Returns:
        int64 [B, L] tokens on the network's device.

    Raises:
        ValueError: settings or tokens that do not fit the family.
    """
    config = config.resolved(family)
    check_tokens(start, family)
    ids_BL, given_BL = (tensor.to(network.device, copy=True) for tensor in (start.ids_BL, start.given_BL))
    if not len(ids_BL) or bool(given_BL.all()):
        return ids_BL
    if config.guidance_scale != 1 and not bool(given_BL.any(1).all()):
        row = int((~given_BL.any(1)).nonzero()[0])
        raise ValueError(f"guidance_scale: {config.guidance_scale:g} needs prompts, and text {row} has none")
    noise = SampleNoise(
        seed, range(len(ids_BL)) if samples is None else samples, ids_BL.shape[1], network.device
    )
    family.fill_in(network, config, ids_BL, given_BL, noise, on_step)
    return ids_BL
