"""Eso-LM's samplers, all with a key-value cache: the reverse process, then left to right; block plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from megatron_dlm.diffusion.noise_schedules import alpha_and_slope
from megatron_dlm.sampling.decoding_plan import Plan
from megatron_dlm.sampling.kv_reader import BehindCache, Reader
from megatron_dlm.sampling.masked_sampler import MaskedSampler
from megatron_dlm.sampling.network import Network


@dataclass(frozen=True, kw_only=True)
class Sampler(MaskedSampler):
    """Feeds each known token once into the key-value cache, then the mask tokens to unmask."""

    samplers: ClassVar = {
        "ancestral": ("num_steps",),
        "block": ("num_steps",),
        "block-autoregressive": ("segment_length", "num_groups"),
        "left-to-right": (),
    }

    @staticmethod
    def schedule_of(config: Any) -> Callable[[float], float]:
        """Noise schedule that ends at alpha_0; tokens still masked then are filled in left to right."""
        return lambda t: float(alpha_and_slope(config.noise_schedule, np.array(t), alpha_0=config.alpha_0)[0])

    def alphas(self, num_steps: int) -> list[float]:
        """Alpha at the steps' edges, up to alpha_0; the sequential part fills in the tokens still masked."""
        return [self.alpha(t) for t in np.linspace(1.0, 0.0, num_steps + 1).tolist()]

    def cached_reader(self, network: Network, order: Plan) -> Reader:
        """Reader with a key-value cache, which feeds the mask tokens to unmask."""
        return BehindCache(network, order, feeds_masks=True)
