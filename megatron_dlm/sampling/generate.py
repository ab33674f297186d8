"""One call that runs the sampler of a family.

Shape legend: B sequences, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_dlm.sampling.categorical import Sharpening
from megatron_dlm.sampling.decoding_plan import Plan
from megatron_dlm.sampling.network import Network, Process
from megatron_dlm.sampling.network_reader import BehindCache, Reader, WholeText
from megatron_dlm.sampling.noise import SampleNoise
from megatron_dlm.sampling.schedules import alphas, plan, times
from megatron_dlm.sampling.settings import SamplingConfig
from megatron_dlm.sampling.start import Start, check_tokens
from megatron_dlm.sampling.uniform import UniformSampler
from megatron_dlm.sampling.unmasking import OnStep, Revealer


@torch.no_grad()
def sample(
    network: Network,
    process: Process,
    config: SamplingConfig,
    start: Start,
    *,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Fill in the tokens that are not given.

    A sample depends on (seed, its number), not on what else is in the batch.

    Args:
        network: trained.
        process: its noise.
        config: of the sampler.
        start: the batch.
        seed: of all draws.
        samples: number of each sequence; 0 to B - 1 where absent.
        on_step: called after each step with its number and the tokens so far.

    Returns:
        int64 [B, L] on the network's device.

    Raises:
        ValueError: settings or tokens that do not fit the family.
    """
    config = config.resolved(process)
    check_tokens(start, process)
    ids_BL, given_BL = (tensor.to(network.device, copy=True) for tensor in (start.ids_BL, start.given_BL))
    if not len(ids_BL) or bool(given_BL.all()):
        return ids_BL
    noise = SampleNoise(
        seed, range(len(ids_BL)) if samples is None else samples, ids_BL.shape[1], network.device
    )
    sharpen = Sharpening(config.temperature, config.top_p)
    eos = process.eos_token_id if config.stop_at_eos else None
    if process.family == "duo":
        one_by_one = config.sampler == "left-to-right"
        UniformSampler(network, process, sharpen, noise, on_step).run(
            ids_BL,
            given_BL,
            [1.0, 0.0] if one_by_one else times(config.num_steps or 0),
            1 if one_by_one else config.block_length,
            greedy_tail=config.greedy_tail,
            eos_token_id=eos,
        )
        return ids_BL
    ids_BL.masked_fill_(~given_BL, process.mask_token_id)
    if config.sampler == "confidence":
        reader: Reader = WholeText(network, process)
        revealer = Revealer(network, process, reader, sharpen, noise, eos, on_step)
        revealer.most_confident(ids_BL, given_BL, config.num_steps or 0, config.block_length)
        return ids_BL
    order = plan(config, process, given_BL.cpu().numpy(), noise)
    reader = _reader(network, process, config, order)
    Revealer(network, process, reader, sharpen, noise, eos, on_step).follow(order, ids_BL, given_BL)
    return ids_BL


def _reader(network: Network, process: Process, config: SamplingConfig, plan: Plan) -> Reader:
    """How the family's network is asked."""
    if process.family in ("ar", "esolm"):
        return BehindCache(network, process, plan)
    num_steps = 1
    levels = None
    if config.sampler == "ancestral":
        levels = alphas(process, config.num_steps or 0)
        num_steps = len(levels) - 1
    return WholeText(
        network,
        process,
        alpha_of_step=None if levels is None else lambda step: levels[step % num_steps],
        window=_window(process, num_steps, config) if process.family == "block-diffusion" else None,
    )


def _window(process: Process, num_steps: int, config: SamplingConfig) -> Callable[[int], int]:
    """Where the block of a step ends; what is behind it no token looks at."""
    size = process.block_size
    steps_per_block = size if config.sampler == "left-to-right" else num_steps
    return lambda step: (step // steps_per_block + 1) * size
