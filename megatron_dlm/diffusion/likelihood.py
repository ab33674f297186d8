"""The likelihood of sequences by an exported model: its bound from noisy copies, drawn as the family does.

A family's `likelihood.py` derives a class `Likelihood` from `FamilyLikelihood` or `DiffusionLikelihood`.
Shape legend: B sequences, L tokens, V ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_dlm.diffusion.noise_schedules import alpha_and_slope


class FamilyLikelihood(ABC):
    """Scores sequences by a model of one family."""

    def __init__(self, config: Any) -> None:
        """Prepare.

        Args:
            config: of the exported model.
        """
        self.config = config

    def token_nats(
        self, logits_BLV: Tensor, noisy_BL: Tensor, clean_BL: Tensor, sigma_B: Tensor | None
    ) -> Tensor:
        """What each position costs before its weight in the bound.

        Args:
            logits_BLV: float32 [B, L, V].
            noisy_BL: int64 [B, L], what the network has read.
            clean_BL: int64 [B, L], tokens to predict.
            sigma_B: [B] noise levels, for families whose loss knows them.

        Returns:
            float64 [B, L]; the cross-entropy, unless a family has another loss.
        """
        return cross_entropy_nats(logits_BLV, clean_BL)

    def nll(
        self, model: Any, ids_BL: Tensor, num_samples: int, seed: int, t_grid: Sequence[float] | None
    ) -> Tensor:
        """Score sequences.

        Args:
            model: exported.
            ids_BL: int64 [B, L] clean tokens.
            num_samples: noisy copies of each.
            seed: of the draws.
            t_grid: times in (0, 1] instead of random ones.

        Returns:
            float64 [B] nats.

        Raises:
            ValueError: no times, or one outside (0, 1].
        """
        if t_grid is not None:
            num_samples = len(t_grid)
            for t in t_grid:
                if not 0 < t <= 1:
                    raise ValueError(f"t_grid: {t} is outside (0, 1]")
        if num_samples < 1:
            raise ValueError(f"num_samples, t_grid: {num_samples} times; at least one is needed")
        return self.estimate(model, ids_BL, num_samples, seed, t_grid)

    @abstractmethod
    def estimate(
        self, model: Any, ids_BL: Tensor, num_samples: int, seed: int, t_grid: Sequence[float] | None
    ) -> Tensor:
        """As `nll`, whose arguments are checked."""


class DiffusionLikelihood(FamilyLikelihood):
    """The mean of the bound's integrand over noisy copies, stratified over the time."""

    def estimate(
        self, model: Any, ids_BL: Tensor, num_samples: int, seed: int, t_grid: Sequence[float] | None
    ) -> Tensor:
        """By `copy`."""
        draws = Draws(ids_BL, seed, num_samples, self.config.time_epsilon, t_grid)
        total_B = torch.zeros(len(ids_BL), dtype=torch.float64, device=ids_BL.device)
        for index in range(num_samples):
            total_B += self.copy(model, ids_BL, draws, index)
        return total_B / num_samples

    @abstractmethod
    def copy(self, model: Any, ids_BL: Tensor, draws: Draws, index: int) -> Tensor:
        """The bound of one noisy copy of each sequence.

        Args:
            model: exported.
            ids_BL: int64 [B, L] clean tokens.
            draws: of the copies.
            index: of the copy.

        Returns:
            float64 [B] nats.
        """

    def alpha_and_slope(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and d alpha / dt of float64 times, of their shape and on their device."""
        pair = alpha_and_slope(self.config.noise_schedule, times.cpu().numpy(), alpha_0=self.alpha_0)
        alpha, slope = (torch.from_numpy(values).to(times.device) for values in pair)
        return alpha, slope

    @property
    def alpha_0(self) -> float:
        """Alpha at time 0."""
        return 1.0

    def mask(self, ids_BL: Tensor, draws: Draws, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Masked (absorbing-state) noise.

        Args:
            ids_BL: int64 [B, L] clean tokens.
            draws: of the copies.
            times: float64 [B, 1] or [B, L].

        Returns:
            Noisy ids, where they are masked, the bound's weights, and alpha of the times' shape.
        """
        alpha, slope = self.alpha_and_slope(times)
        masked_BL = draws.uniform(*ids_BL.shape) < 1 - alpha
        noisy_BL = torch.where(masked_BL, self.config.mask_token_id, ids_BL)
        return noisy_BL, masked_BL, masked_BL * -slope / (1 - alpha), alpha


def cross_entropy_nats(logits_BLV: Tensor, clean_BL: Tensor) -> Tensor:
    """Cross-entropy of each position, float64 [B, L]."""
    return functional.cross_entropy(logits_BLV.transpose(1, 2), clean_BL, reduction="none").double()


class Draws:
    """Seeded draws, made on the CPU so that every device gets the same."""

    def __init__(
        self,
        ids_BL: Tensor,
        seed: int,
        num_samples: int,
        time_epsilon: float,
        t_grid: Sequence[float] | None,
    ) -> None:
        """Begin.

        Args:
            ids_BL: int64 [B, L], sequences to draw for.
            seed: of all draws.
            num_samples: copies of each sequence.
            time_epsilon: smallest time.
            t_grid: times instead of random ones.
        """
        self.generator = torch.Generator().manual_seed(seed)
        self._shape, self._device = ids_BL.shape, ids_BL.device
        self._num_samples = num_samples
        self._time_epsilon = time_epsilon
        self._t_grid = t_grid

    def uniform(self, *shape: int) -> Tensor:
        """float64 in [0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self._device)

    def integers(self, count: int) -> Tensor:
        """int64 [B, L] in [0, count)."""
        return torch.randint(count, self._shape, generator=self.generator).to(self._device)

    def times(self, index: int, columns: int = 1) -> Tensor:
        """Times of a copy.

        Args:
            index: of the copy, and of its stratum of [time_epsilon, 1].
            columns: times of a sequence.

        Returns:
            float64 [B, columns]; the grid's where there is one.
        """
        if self._t_grid is not None:
            shape = (self._shape[0], columns)
            return torch.full(shape, float(self._t_grid[index]), dtype=torch.float64, device=self._device)
        strata = (self.uniform(self._shape[0], columns) + index) / self._num_samples
        return self._time_epsilon + (1 - self._time_epsilon) * strata
