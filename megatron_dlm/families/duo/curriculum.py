"""Duo's Gaussian curriculum (arXiv:2506.10892): early steps see soft tokens, softmax(w / temperature).

w is Gaussian noise around the clean token's one-hot vector, and its argmax is the uniform-state token. Only
entries within a few temperatures of the largest carry weight, so w is drawn as its largest entries alone,
by exact order statistics of the V - 1 pure-noise entries, and never as a vector over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.rng import NoiseSource

QUADRATURE_POINTS = 4001
QUADRATURE_REACH = 12.0
"""Standard deviations to both sides of the integrand's Gaussian."""
SMALLEST_SHARE = 1e-6
"""Smallest alpha, and smallest 1 - alpha, allowed at gamma_min and gamma_max."""
LARGEST_DROPPED = 1e-3
"""Largest share of a soft token's weight that may lie on entries dropped by top_k."""


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Duo's curriculum of soft tokens (arXiv:2506.10892); off by default, as in arXiv:2602.15014."""

    steps: int = 0
    """Optimizer steps at the start of training that use soft tokens instead of sampled ones; 0: none."""
    temperature: float = 1e-3
    """Temperature of the softmax that blends embeddings."""
    gamma_min: float = -3.55
    """gamma at t = 0; gamma(t) = gamma_min + t (gamma_max - gamma_min) is minus the log signal-to-noise
    ratio."""
    gamma_max: float = -1.85
    """gamma at t = 1."""
    top_k: int = 16
    """Largest noise entries per soft token that are kept; ample at the default temperature, too few at a high
    one."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(f"objective.curriculum.steps: {self.steps} is below 0")
        if not self.temperature > 0:
            raise InputError(f"objective.curriculum.temperature: {self.temperature} is not above 0")
        if not self.gamma_min < self.gamma_max:
            raise InputError(
                f"objective.curriculum.gamma_min: {self.gamma_min} is not below gamma_max {self.gamma_max}"
            )
        if self.top_k < 1:
            raise InputError(f"objective.curriculum.top_k: {self.top_k} is below 1")


def signal_probability(
    gamma: NDArray[np.float64], states: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Alpha of the uniform-state process that the argmax follows, and d alpha / d gamma.

    alpha = (V p - 1) / (V - 1), p = integral of phi(u - exp(-gamma / 2)) Phi(u)^(V-1) du, the probability
    that the clean token's entry is the largest (arXiv:2506.10892, diffusion transformation operator).

    Args:
        gamma: float64, any shape.
        states: V.

    Returns:
        Two arrays of gamma's shape.
    """
    mean = np.exp(-gamma / 2)[..., None]
    z, step = np.linspace(-QUADRATURE_REACH, QUADRATURE_REACH, QUADRATURE_POINTS, retstep=True)
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi) * step
    others = np.exp((states - 1) * torch.special.log_ndtr(torch.from_numpy(mean + z)).numpy())
    p, dp_dmean = (density * others).sum(-1), (density * z * others).sum(-1)
    scale = states / (states - 1)
    return scale * p - 1 / (states - 1), scale * dp_dmean * (-mean[..., 0] / 2)


class GaussianCurriculum:
    """Soft tokens and their noise level over `states` states; a state is given by its ordinal."""

    def __init__(self, config: CurriculumConfig, states: int) -> None:
        if config.steps and config.top_k > states - 1:
            raise InputError(
                f"objective.curriculum.top_k: {config.top_k} exceeds the {states - 1} other states"
            )
        self._config = config
        self._states = states
        if config.steps:
            self._check()

    def _check(self) -> None:
        """Refuse noise levels without signal or noise, and a top_k that drops weight."""
        config = self._config
        alphas, _ = signal_probability(np.array([config.gamma_min, config.gamma_max]), self._states)
        for name, alpha in zip(("gamma_min", "gamma_max"), alphas, strict=True):
            if not SMALLEST_SHARE <= alpha <= 1 - SMALLEST_SHARE:
                raise InputError(
                    f"objective.curriculum.{name}: {getattr(config, name)} leaves a token clean with "
                    f"probability {alpha:.3g} of {self._states} states, outside [{SMALLEST_SHARE}, "
                    f"1 - {SMALLEST_SHARE}]"
                )
        # Typical weights of the noise entries, largest first; the smallest spread has the most of them.
        quantiles = (np.arange(self._states - 1) + 0.5) / (self._states - 1)
        entries = (
            np.sqrt(_sigmoid(np.array(config.gamma_min)))
            * -torch.special.ndtri(torch.from_numpy(quantiles)).numpy()
        )
        weights = np.exp((entries - entries[0]) / config.temperature)
        dropped = weights[config.top_k :].sum() / weights.sum()
        if dropped > LARGEST_DROPPED:
            raise InputError(
                f"objective.curriculum.top_k: {config.top_k} drops {dropped:.2g} of the weight of soft "
                f"tokens at temperature {config.temperature}, more than {LARGEST_DROPPED}"
            )

    def gamma(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        """Minus the log signal-to-noise ratio at time t."""
        return self._config.gamma_min + t * (self._config.gamma_max - self._config.gamma_min)

    def alpha_and_slope(self, t: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """alpha_t of the argmax and d alpha / dt, of t's shape."""
        alpha, dalpha_dgamma = signal_probability(self.gamma(t), self._states)
        return alpha, dalpha_dgamma * (self._config.gamma_max - self._config.gamma_min)

    def mix(
        self,
        clean_BL: NDArray[np.int64],
        t_B1: NDArray[np.float64],
        sample_indices: NDArray[np.int64],
        noise: NoiseSource,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Draw soft tokens as their largest entries, the only ones that carry weight.

        Args:
            clean_BL: int64 [B, L] ordinals of the clean tokens.
            t_B1: float64 [B, 1] diffusion times in [0, 1].
            sample_indices: int64 [B], sample positions in the run, which address the random draws.
            noise: source of the random draws.

        Returns:
            Ordinals int64 [B, L, k + 1], largest entry first, and their weights, float32, adding up to 1.
        """
        config, (batch, length), k = self._config, clean_BL.shape, self._config.top_k
        uniform = noise.uniform("duo/gaussian", sample_indices, length * (k + 1)).reshape(
            batch, length, k + 1
        )
        # Guarded away from 0, where the inverse of the distribution function is infinite.
        uniform = np.maximum(uniform, 2.0**-54)
        gamma_B1 = self.gamma(t_B1)
        signal, spread = np.sqrt(_sigmoid(-gamma_B1)), np.sqrt(_sigmoid(gamma_B1))
        own_BL = signal + spread * torch.special.ndtri(torch.from_numpy(uniform[..., 0])).numpy()
        others_BLk = spread[..., None] * _largest_of(self._states - 1, uniform[..., 1:])
        ranks_BLk = self._distinct(sample_indices, length, noise)
        ids = np.concatenate([clean_BL[..., None], ranks_BLk + (ranks_BLk >= clean_BL[..., None])], axis=-1)
        entries = np.concatenate([own_BL[..., None], others_BLk], axis=-1)
        order = np.argsort(-entries, axis=-1, kind="stable")
        ids, entries = (np.take_along_axis(a, order, axis=-1) for a in (ids, entries))
        weights = np.exp((entries - entries[..., :1]) / config.temperature)
        return ids, (weights / weights.sum(-1, keepdims=True)).astype(np.float32)

    def _distinct(
        self, sample_indices: NDArray[np.int64], length: int, noise: NoiseSource
    ) -> NDArray[np.int64]:
        """Different ordinals among the V - 1 others, int64 [B, L, k], by Fisher and Yates's shuffle."""
        k, others = self._config.top_k, self._states - 1
        words = np.stack([noise.words("duo/entries", int(i), length * k) for i in sample_indices])
        bounds = np.arange(others, others - k, -1, dtype=np.uint64)
        drawn = (words.reshape(-1, length, k) % bounds).astype(np.int64)
        for j in range(1, k):
            # Draw j counts the values not yet taken: step over the taken ones in increasing order.
            for taken in np.moveaxis(np.sort(drawn[..., :j], axis=-1), -1, 0):
                drawn[..., j] += drawn[..., j] >= taken
        return drawn


def _largest_of(count: int, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """The k largest of `count` standard Gaussians, in decreasing order, from k uniform draws each.

    The largest of n uniforms is u^(1/n), the next the largest of n - 1 below it, and so on.
    """
    k = uniform.shape[-1]
    log_rank = np.cumsum(np.log(uniform) / np.arange(count, count - k, -1), axis=-1)
    # ndtri(x) = -ndtri(1 - x), and 1 - x is accurate near the top of the distribution.
    tail = -np.expm1(log_rank)
    return -torch.special.ndtri(torch.from_numpy(tail)).numpy()


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-x))
