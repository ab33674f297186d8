"""Eso-LM's samplers, all behind a cache: the reverse process, then left to right, and plans in blocks."""

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
from megatron_dlm.sampling.settings import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Sampler(MaskedSampler):
    """Feeds known tokens once, and the masks to reveal behind them."""

    samplers: ClassVar = {
        "ancestral": ("num_steps",),
        "block": ("num_steps",),
        "block-autoregressive": ("segment_length", "num_groups"),
        "left-to-right": (),
    }

    @staticmethod
    def schedule_of(config: Any) -> Callable[[float], float]:
        """Ends at alpha_0: what is masked then is filled in left to right."""
        return lambda t: float(alpha_and_slope(config.noise_schedule, np.array(t), alpha_0=config.alpha_0)[0])

    def alphas(self, num_steps: int) -> list[float]:
        """No step removes the last noise: that is left to the tokens still masked."""
        return [self.alpha(t) for t in np.linspace(1.0, 0.0, num_steps + 1).tolist()]

    def reader(self, network: Network, config: SamplingConfig, order: Plan) -> Reader:
        """Behind a cache."""
        return BehindCache(network, order, feeds_masks=True)
