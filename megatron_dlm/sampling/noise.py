"""Random draws of a sampler: functions of (seed, sample, step, position), independent of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dlm.platform.rng import NoiseSource


class SampleNoise:
    """Uniform draws for the samples of one batch."""

    def __init__(self, seed: int, samples: Sequence[int], length: int, device: torch.device) -> None:
        self._source = NoiseSource(seed, "sample")
        self.samples = samples
        self._length = length
        self._device = device

    def uniform(self, stream: str, step: int = 0) -> Tensor:
        """Uniform draws in [0, 1), one per position.

        Args:
            stream: name of the random stream.
            step: step of the sampler; streams of different steps are independent.

        Returns:
            float64 [B, L] on the network's device.
        """
        drawn = self._source.uniform(f"{stream}/{step}", self.samples, self._length)
        return torch.from_numpy(drawn).to(self._device)
