"""Settings and draws that all diffusion families share: noise schedule, times, truncated lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.diffusion.noise_schedules import Schedule, alpha_and_slope
from megatron_dlm.diffusion.time_sampling import TimeOrder, batch_strata
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.interfaces import AttentionPattern, InputError, TokenBatch, Vocabulary

MaskedLoss = Literal["low-variance", "elbo"]


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(ObjectiveConfig):
    """Fields of every diffusion family."""

    can_change: ClassVar[tuple[str, ...]] = ("time_epsilon", "largest_time")

    noise_schedule: Schedule = "log-linear"
    """Noise schedule alpha_t, the share of clean tokens at time t: log-linear 1 - 0.999 t, linear 1 - t,
    cosine 1 - cos(pi (1 - t) / 2)."""
    time_epsilon: float = 1e-3
    """Smallest diffusion time that is drawn, in [0, 1)."""
    largest_time: float = 1.0
    """Largest diffusion time that training draws, above time_epsilon; evaluation goes to 1."""
    time_order: TimeOrder = "scrambled"
    """How the strata of diffusion times are spread over the global batch. scrambled: any slice of the batch
    has times from all over [0, 1]; reference: in order, as in the paper's code."""
    ssl_ratio: float = 0.0
    """Probability that a training step cuts its samples to a random length (0.01 in arXiv:2602.15014)."""
    ssl_multiple: int = 1
    """Random lengths are rounded up to a multiple of this, which sequence and context parallelism need."""

    def __post_init__(self) -> None:
        if not 0 <= self.time_epsilon < 1:
            raise InputError(f"objective.time_epsilon: {self.time_epsilon} is outside [0, 1)")
        if not self.time_epsilon < self.largest_time <= 1:
            raise InputError(
                f"objective.largest_time: {self.largest_time} is outside ({self.time_epsilon}, 1], from "
                "time_epsilon to 1"
            )
        if not 0 <= self.ssl_ratio <= 1:
            raise InputError(f"objective.ssl_ratio: {self.ssl_ratio} is outside [0, 1]")
        if self.ssl_multiple < 1:
            raise InputError(f"objective.ssl_multiple: {self.ssl_multiple} is below 1")

    def check_prompts(self, *, training: bool) -> None:
        """Also refuse random lengths in training: a sample cut to its prompt has no token to learn."""
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
        """Prior term of masked diffusion; the few tokens that are clean at t = 1 are drawn uniformly."""
        return self.alpha(1.0) * math.log(vocabulary.size - 1)

    @property
    def has_times(self) -> bool:
        """True: the NELBO of a diffusion family is an integral over the diffusion time."""
        return True

    @property
    def training_times(self) -> tuple[float, float] | None:
        """From `time_epsilon` to `largest_time`; None: to 1."""
        return None if self.largest_time == 1 else (self.time_epsilon, self.largest_time)

    @property
    def min_time(self) -> float:
        """Smallest diffusion time in the NELBO, `time_epsilon`."""
        return self.time_epsilon

    def time_bands(
        self, sample_indices: NDArray[np.int64], context: CorruptionContext, count: int
    ) -> NDArray[np.int64] | None:
        """Band of the stratum from which each sample's time is drawn."""
        if not self.has_loss_by_time:
            return None
        strata = batch_strata(sample_indices, context, self.time_order)[:, 0]
        return strata * count // context.global_batch_size

    def length_multiple(self, seq_length: int) -> int:
        """A truncated sample's length is a multiple of `ssl_multiple`, or `seq_length`."""
        return math.gcd(seq_length, self.ssl_multiple) if self.ssl_ratio else seq_length


@dataclass(frozen=True, kw_only=True)
class BidirectionalConfig(DiffusionConfig):
    """Fields of the families whose positions see the whole text."""

    attention: ClassVar[AttentionPattern] = AttentionPattern.BIDIRECTIONAL
    can_change: ClassVar[tuple[str, ...]] = (*DiffusionConfig.can_change, "lookahead")

    lookahead: float = 1.0
    """Tokens to its right that a position sees, as a share of the sequence length, from 0, AR's attention, to
    1, all; below 1 by `schedules` alone, for example "lookahead 0:0 2000" for a run that starts from an AR
    model's weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lookahead <= 1:
            raise InputError(f"objective.lookahead: {self.lookahead} is outside [0, 1]")

    @property
    def training_lookahead(self) -> float:
        """The field's value."""
        return self.lookahead


def clean_tokens(
    batch: TokenBatch, context: CorruptionContext, config: DiffusionConfig, multiple: int = 1
) -> NDArray[np.int64]:
    """Tokens to corrupt: a block without its look-ahead token, cut short with probability `ssl_ratio`.

    One length is drawn for the whole global batch, so all layouts cut to the same length.

    Args:
        batch: clean token blocks.
        context: address of the random draw; evaluation never cuts.
        config: configuration with `ssl_ratio` and `ssl_multiple`.
        multiple: the length is also rounded up to a multiple of this.

    Returns:
        int64 [B, L'], L' the whole length or a uniform draw from {1, ..., L}, rounded up.
    """
    tokens_BL: NDArray[np.int64] = batch.token_ids[:, :-1].numpy()
    length = tokens_BL.shape[1]
    if context.training and config.ssl_ratio > 0:
        coin, share = context.noise.uniform("ssl/length", [context.batch_start], 2)[0]
        if coin < config.ssl_ratio:
            multiple = math.lcm(multiple, config.ssl_multiple)
            length = min(length, -(-(1 + int(share * length)) // multiple) * multiple)
    return np.ascontiguousarray(tokens_BL[:, :length])
