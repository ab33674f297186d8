"""What every diffusion family configures and draws alike: schedule, times, truncated lengths, weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dlm.interfaces import AttentionMask, InputError, ModelInputs, Targets, TokenBatch, Vocabulary
from megatron_dlm.objectives.base import CorruptionContext, ObjectiveConfig
from megatron_dlm.objectives.schedules import Schedule, alpha_and_slope
from megatron_dlm.objectives.time_sampling import TimeOrder

MaskedLoss = Literal["low-variance", "elbo"]


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(ObjectiveConfig):
    """Fields of every diffusion family."""

    noise_schedule: Schedule = "log-linear"
    """alpha_t: log-linear 1 - 0.999 t, linear 1 - t, cosine 1 - cos(pi (1 - t) / 2)."""
    time_epsilon: float = 1e-3
    """Smallest diffusion time."""
    time_order: TimeOrder = "scrambled"
    """Which place of the global batch gets which stratum of time; reference ties places to bands."""
    ssl_ratio: float = 0.0
    """Probability that a training step cuts its samples to one random length (arXiv:2602.15014: 0.01)."""
    ssl_multiple: int = 1
    """Random lengths are rounded up to a multiple of this; sequence and context parallelism ask for one."""

    def __post_init__(self) -> None:
        if not 0 <= self.time_epsilon < 1:
            raise InputError(f"objective.time_epsilon: {self.time_epsilon} is outside [0, 1)")
        if not 0 <= self.ssl_ratio <= 1:
            raise InputError(f"objective.ssl_ratio: {self.ssl_ratio} is outside [0, 1]")
        if self.ssl_multiple < 1:
            raise InputError(f"objective.ssl_multiple: {self.ssl_multiple} is below 1")

    def check_prompts(self, *, training: bool) -> None:
        """Refuse random lengths in training too: a sample cut to its prompt has nothing to learn."""
        super().check_prompts(training=training)
        if training and self.ssl_ratio:
            raise InputError(
                f"objective.ssl_ratio: {self.ssl_ratio} would cut responses off, with data of prompts and "
                "responses it is 0"
            )

    def alpha(self, t: float) -> float:
        """Probability that a token is still clean at time t."""
        return float(alpha_and_slope(self.noise_schedule, np.array(t))[0])

    def prior_nats(self, vocabulary: Vocabulary) -> float:
        """Of masked diffusion; the prior draws the few tokens that are clean at t = 1 uniformly."""
        return self.alpha(1.0) * math.log(vocabulary.size - 1)

    @property
    def has_times(self) -> bool:
        """It is."""
        return True

    def length_multiple(self, seq_length: int) -> int:
        """A truncated sample's length is a multiple of `ssl_multiple`, or `seq_length`."""
        return math.gcd(seq_length, self.ssl_multiple) if self.ssl_ratio else seq_length


def clean_tokens(
    batch: TokenBatch, context: CorruptionContext, config: DiffusionConfig, multiple: int = 1
) -> NDArray[np.int64]:
    """The tokens to corrupt: a block without its look-ahead, now and then cut short.

    The length is drawn for the whole global batch, so every layout cuts alike.

    Args:
        batch: clean blocks.
        context: address of the draw; evaluation never cuts.
        config: says how often.
        multiple: the length is rounded up to a multiple of this, too.

    Returns:
        int64 [B, L'], L' the whole length or one uniform in {1, ..., L}.
    """
    tokens_BL: NDArray[np.int64] = batch.token_ids[:, :-1].numpy()
    length = tokens_BL.shape[1]
    if context.training and config.ssl_ratio > 0:
        coin, share = context.noise.uniform("ssl/length", [context.batch_start], 2)[0]
        if coin < config.ssl_ratio:
            multiple = math.lcm(multiple, config.ssl_multiple)
            length = min(length, -(-(1 + int(share * length)) // multiple) * multiple)
    return np.ascontiguousarray(tokens_BL[:, :length])


def coins(batch: TokenBatch, context: CorruptionContext, stream: str, length: int) -> NDArray[np.float64]:
    """Draws that decide, against 1 - alpha, which tokens become noise.

    Args:
        batch: clean blocks.
        context: address of the draws.
        stream: name of the draws.
        length: tokens of each sample that are left.

    Returns:
        float64 [B, length] in [0, 1); at tokens that are never noised 1, which is below no probability.
    """
    uniform_BL = context.noise.uniform(stream, batch.sample_indices, length)
    return np.where(noised_tokens(batch, length), uniform_BL, 1.0)


def noised_tokens(batch: TokenBatch, length: int) -> NDArray[np.bool_]:
    """Where tokens may become noise: everywhere but in prompts and padding.

    Args:
        batch: clean blocks.
        length: tokens of each sample that are left.

    Returns:
        bool [B, length].
    """
    if batch.loss_mask is None:
        return np.ones((len(batch.sample_indices), length), dtype=np.bool_)
    mask_BL: NDArray[np.bool_] = batch.loss_mask[:, :length].numpy()
    return mask_BL


def masked_targets(
    clean_BL: NDArray[np.int64],
    noisy_BL: NDArray[np.int64],
    masked_BL: NDArray[np.bool_],
    alpha_BL: NDArray[np.float64],
    dalpha_BL: NDArray[np.float64],
    *,
    token_count: int,
    low_variance: bool,
) -> Targets:
    """Targets of absorbing-state diffusion: masked tokens, weighted -alpha'/(1 - alpha) in the NELBO.

    Args:
        clean_BL: int64 [B, L].
        noisy_BL: int64 [B, L].
        masked_BL: bool [B, L].
        alpha_BL: float64 [B, L] or [B, 1].
        dalpha_BL: float64, as alpha.
        token_count: tokens the sum is divided by.
        low_variance: train with weight 1 instead (arXiv:2602.15014 eq. 8).

    Returns:
        Targets over the L positions.
    """
    bound_BL = np.where(masked_BL, -dalpha_BL / (1.0 - alpha_BL), 0.0)
    return Targets(
        clean_BL=torch.from_numpy(clean_BL),
        noisy_BL=torch.from_numpy(noisy_BL),
        alpha_BL=torch.from_numpy(np.broadcast_to(alpha_BL, clean_BL.shape).copy()),
        weight_BL=torch.from_numpy(masked_BL.astype(np.float64) if low_variance else bound_BL),
        bound_weight_BL=torch.from_numpy(bound_BL),
        token_count=token_count,
    )


def reordered(targets: Targets, order_BL: NDArray[np.int64]) -> Targets:
    """The targets with their positions in the order of `order_BL` (int64 [B, L], a permutation a row)."""
    order = torch.from_numpy(order_BL)
    moved = {name: value.gather(1, order) for name, value in vars(targets).items() if name.endswith("_BL")}
    return replace(targets, **moved)


def scaled(targets: Targets, factor: float) -> Targets:
    """The targets with both weights times `factor`."""
    return replace(
        targets,
        weight_BL=targets.weight_BL * factor,
        bound_weight_BL=targets.bound_weight_BL * factor,
    )


def append_clean(targets: Targets, position_ids: Tensor, *, block_size: int) -> tuple[ModelInputs, Targets]:
    """Inputs [noisy ; clean] and targets of the same 2 L positions; the clean half carries no loss.

    Args:
        targets: over the L positions of the noisy half.
        position_ids: int64 [B, L] or [1, L], of each half.
        block_size: tokens that are noised together and see each other.

    Returns:
        Inputs and targets of one microbatch.
    """
    clean_BL = targets.clean_BL
    nothing = torch.zeros_like(targets.weight_BL)
    inputs = ModelInputs(
        token_ids_BL=torch.cat([targets.noisy_BL, clean_BL], dim=1),
        position_ids_BL=torch.cat([position_ids, position_ids], dim=1),
        sigma_B=torch.zeros(len(clean_BL)),
        attention_mask=noisy_then_clean_mask(clean_BL.shape[1], block_size),
    )
    doubled = Targets(
        clean_BL=torch.cat([clean_BL, clean_BL], dim=1),
        noisy_BL=inputs.token_ids_BL,
        alpha_BL=torch.cat([targets.alpha_BL, torch.ones_like(nothing)], dim=1),
        weight_BL=torch.cat([targets.weight_BL, nothing], dim=1),
        bound_weight_BL=torch.cat([targets.bound_weight_BL, nothing], dim=1),
        token_count=targets.token_count,
    )
    return inputs, doubled


@lru_cache(maxsize=8)
def noisy_then_clean_mask(length: int, block_size: int) -> AttentionMask:
    """Who may look at whom in [noisy ; clean], cut into blocks alike.

    A noisy position sees its own noisy block and the clean blocks before it; a clean one those up to its own.

    Args:
        length: L, positions of one half.
        block_size: tokens of a block.

    Returns:
        Of 2 L positions.
    """
    block = torch.arange(length, dtype=torch.int32) // block_size
    return AttentionMask.of(
        reach=torch.cat([block - 1, block]),
        query_group=torch.cat([block, torch.full_like(block, -2)]),
        order=torch.cat([torch.full_like(block, AttentionMask.NEVER), block]),
        key_group=torch.cat([block, torch.full_like(block, -1)]),
    )
