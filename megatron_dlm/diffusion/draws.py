"""Random draws of an exported model's noisy copies: by text and seed for scores, free for training.

Shape legend: B sequences, L tokens.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dlm.diffusion.texts import Texts


class Draws(ABC):
    """Random draws for the noisy copies of texts."""

    def __init__(self, texts: Texts, time_epsilon: float) -> None:
        """Keep the shape.

        Args:
            texts: sequences to draw for.
            time_epsilon: smallest diffusion time.
        """
        self.texts = texts
        self.time_epsilon = time_epsilon

    @abstractmethod
    def uniform(self, size: int = 1) -> Tensor:
        """Uniform draws in [0, 1), one for every `size` tokens.

        Args:
            size: tokens that share a draw.

        Returns:
            float64 [B, L], constant over each piece of `size` tokens.
        """

    def integers(self, count: int) -> Tensor:
        """Uniform integers in [0, count), int64 [B, L]."""
        return (self.uniform() * count).long().clamp(max=count - 1)

    @abstractmethod
    def times(self, index: int, size: int | None = None) -> Tensor:
        """Diffusion times of one copy, in [time_epsilon, 1].

        Args:
            index: index of the copy.
            size: tokens that share a time; None: all tokens of a text.

        Returns:
            float64 [B, 1], or [B, L] where `size` is given.
        """


class SeededDraws(Draws):
    """Draws that depend on a text's tokens and the seed alone; made on the CPU, the same for every device."""

    def __init__(
        self,
        texts: Texts,
        seed: int,
        num_samples: int,
        time_epsilon: float,
        t_grid: Sequence[float] | None,
    ) -> None:
        """Seed a generator for each text.

        Args:
            texts: sequences to draw for.
            seed: random seed.
            num_samples: noisy copies of each sequence, each of which has its stratum of the times.
            time_epsilon: smallest diffusion time.
            t_grid: diffusion times to use instead of random ones.
        """
        super().__init__(texts, time_epsilon)
        self._lengths = texts.lengths
        self._generators = [
            torch.Generator().manual_seed(_seed_of(ids[:length], seed))
            for ids, length in zip(texts.ids_BL.tolist(), self._lengths, strict=True)
        ]
        self._num_samples = num_samples
        self._t_grid = t_grid

    def uniform(self, size: int = 1) -> Tensor:
        """Draws of each text's own generator; 0 at padding."""
        drawn_BL = torch.zeros(self.texts.ids_BL.shape, dtype=torch.float64)
        for row, length, generator in zip(drawn_BL, self._lengths, self._generators, strict=True):
            pieces = torch.rand(-(-length // size), generator=generator, dtype=torch.float64)
            row[:length] = pieces.repeat_interleave(size)[:length]
        return drawn_BL.to(self.texts.ids_BL.device)

    def times(self, index: int, size: int | None = None) -> Tensor:
        """Times of the copy's stratum, or the time of `t_grid` if one was given."""
        length = self.texts.ids_BL.shape[1]
        strata = self.uniform(length if size is None else size)
        if size is None:
            strata = strata[:, :1]
        if self._t_grid is not None:
            return torch.full_like(strata, float(self._t_grid[index]))
        return self.time_epsilon + (1 - self.time_epsilon) * (strata + index) / self._num_samples


class FreeDraws(Draws):
    """Draws from torch's random state, for training; times are stratified over the batch."""

    def uniform(self, size: int = 1) -> Tensor:
        """Draws on the CPU, moved to the texts' device."""
        count, length = self.texts.ids_BL.shape
        pieces = torch.rand(count, -(-length // size), dtype=torch.float64)
        return pieces.repeat_interleave(size, dim=1)[:, :length].to(self.texts.ids_BL.device)

    def times(self, index: int, size: int | None = None) -> Tensor:
        """Times of which each text, or piece of it, has one in a stratum of its own."""
        count, length = self.texts.ids_BL.shape
        drawn = self.uniform(length if size is None else size)
        if size is None:
            drawn = drawn[:, :1]
        strata = torch.randperm(count).to(drawn.device)[:, None]
        return self.time_epsilon + (1 - self.time_epsilon) * (drawn + strata) / count


def _seed_of(ids: Sequence[int], seed: int) -> int:
    digest = hashlib.sha256(f"{seed}/{list(ids)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
