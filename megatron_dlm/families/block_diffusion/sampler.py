"""Block diffusion's samplers: block after block, each by the reverse process or left to right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dlm.sampling.masked_sampler import MaskedSampler
from megatron_dlm.sampling.settings import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Sampler(MaskedSampler):
    """A token attends to its own block and the blocks before it, never to later blocks."""

    samplers: ClassVar = {"ancestral": ("num_steps",), "left-to-right": ()}

    block_size: int
    """Tokens per block."""

    def block_of(self, unknown_n: NDArray[Any], config: SamplingConfig) -> NDArray[Any]:
        """Blocks of the trained model, counted from the start of the text."""
        return unknown_n // self.block_size

    def left_to_right_steps(self, unknown_n: NDArray[Any]) -> NDArray[Any]:
        """Steps by position, so that each step works on one block in all sequences."""
        return unknown_n

    def reading(self, config: SamplingConfig) -> dict[str, Any]:
        """Read the text up to the end of the current step's block, with block-causal attention."""
        steps = self.block_size
        if config.sampler == "ancestral":
            steps = len(self.alphas(config.num_steps or 0)) - 1
        return {
            "window": lambda step: (step // steps + 1) * self.block_size,
            "visible_of": self._visible,
        }

    def _visible(self, length: int, device: torch.device) -> Tensor:
        block = torch.arange(length, device=device) // self.block_size
        return block[:, None] >= block
