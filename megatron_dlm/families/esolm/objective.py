"""Eso-LM: masked diffusion down to alpha_0, then left-to-right filling (arXiv:2506.01928).

With alpha_0 = 1, the setting of arXiv:2602.15014, it is masked diffusion under causal attention over a
random order, clean tokens first. Below 1 a part of each batch trains the sequential half instead: the
network reads [z_0 ; x] and each masked token sees the clean tokens before it in the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.diffusion.corruptions import absorb, coins, noised_tokens
from megatron_dlm.diffusion.noise_schedules import alpha_and_slope
from megatron_dlm.diffusion.targets import append_clean, masked_targets, reordered, scaled, weighted_targets
from megatron_dlm.diffusion.time_sampling import batch_strata, times_in_strata
from megatron_dlm.families.base import CrossEntropyObjective, Objective
from megatron_dlm.families.diffusion_family import DiffusionConfig, MaskedLoss, clean_tokens
from megatron_dlm.families.esolm.likelihood import CLEAN_KEYS
from megatron_dlm.interfaces import AttentionPattern, InputError, ModelInputs, Targets, TokenBatch, Vocabulary


@dataclass(frozen=True, kw_only=True)
class EsoLMConfig(DiffusionConfig):
    """Masked diffusion with causal attention and a sequential part."""

    name: ClassVar[str] = "esolm"
    attention: ClassVar[AttentionPattern] = AttentionPattern.CAUSAL

    alpha_0: float = 1.0
    """Expected share of tokens made by diffusion; the others are filled left to right."""
    batch_split: float = 1.0
    """Share of each global batch that trains the diffusion part; 1 for alpha_0 = 1, 0 for alpha_0 = 0."""
    loss: MaskedLoss = "low-variance"
    """Training weight of a token masked by diffusion: 1, or the NELBO's -alpha'/(1 - alpha)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha_0", "batch_split"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"objective.{name}: {getattr(self, name)} is outside [0, 1]")
        if self.alpha_0 in (0.0, 1.0) and self.batch_split != self.alpha_0:
            raise InputError(
                f"objective.batch_split: {self.batch_split} trains a part that alpha_0 {self.alpha_0} has not"
            )

    def num_diffusion(self, batch_size: int) -> int:
        """Samples of a global batch that train the diffusion part."""
        return int(self.batch_split * batch_size)

    def alpha(self, t: float) -> float:
        """Probability that a token is still clean at time t."""
        return self.alpha_0 * super().alpha(t)

    @property
    def has_times(self) -> bool:
        """It is, unless all is sequential."""
        return self.alpha_0 > 0

    @property
    def has_parts(self) -> bool:
        """Whether both parts are trained."""
        return 0 < self.alpha_0 < 1

    def check_sizes(self, batch_size: int, seq_length: int) -> None:
        """Refuse a batch whose split leaves one of the two parts without samples."""
        if 0 < self.alpha_0 < 1 and not 0 < self.num_diffusion(batch_size) < batch_size:
            raise InputError(
                f"objective.batch_split: {self.batch_split} of a global batch of {batch_size} leaves "
                f"{self.num_diffusion(batch_size)} samples to diffusion; both parts need at least one"
            )

    def build(self, vocabulary: Vocabulary) -> Objective:
        """The family over `vocabulary`."""
        return EsoLM(self, vocabulary.mask_token_id)


class EsoLM(CrossEntropyObjective):
    """Samples of a global batch belong to the diffusion or to the sequential part by their stratum."""

    def __init__(self, config: EsoLMConfig, mask_token_id: int) -> None:
        self._config = config
        self._mask_token_id = mask_token_id

    def split(self, batch: TokenBatch, context: CorruptionContext) -> list[TokenBatch]:
        """The diffusion samples and the sequential ones."""
        is_diffusion = self._is_diffusion(batch, context)
        parts = [np.flatnonzero(is_diffusion), np.flatnonzero(~is_diffusion)]
        return [batch.rows(rows) for rows in parts if len(rows)]

    def corrupt(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Corrupt samples of one part; the other part's share of the batch is folded into the weights."""
        is_diffusion = self._is_diffusion(batch, context)
        if is_diffusion.all():
            return self._diffusion(batch, context)
        if is_diffusion.any():
            raise ValueError("samples of both parts in one microbatch; divide it with split()")
        return self._sequential(batch, context)

    def _is_diffusion(self, batch: TokenBatch, context: CorruptionContext) -> NDArray[np.bool_]:
        strata = batch_strata(batch.sample_indices, context, self._config.time_order)[:, 0]
        return strata < self._config.num_diffusion(context.global_batch_size)

    def _diffusion(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Mask at time t, then order: prompts, clean tokens, masked ones, each at random."""
        config = self._config
        clean_BL = clean_tokens(batch, context, config)
        num_diffusion = config.num_diffusion(context.global_batch_size)
        t_B1 = times_in_strata(
            batch_strata(batch.sample_indices, context, config.time_order),
            num_diffusion,
            batch.sample_indices,
            context,
            time_epsilon=config.time_epsilon,
        )
        alpha_B1, dalpha_B1 = alpha_and_slope(config.noise_schedule, t_B1, alpha_0=config.alpha_0)
        length = clean_BL.shape[1]
        uniform_BL = coins(batch, context, "mask", length)
        noisy_BL, masked_BL = absorb(clean_BL, alpha_B1, uniform_BL, self._mask_token_id)
        random_BL = CLEAN_KEYS * context.noise.uniform("esolm/order", batch.sample_indices, length)
        key_BL = masked_BL + random_BL - ~noised_tokens(batch, length)
        order_BL = np.argsort(key_BL, axis=1, kind="stable")
        low_variance = context.training and config.loss == "low-variance"
        targets = masked_targets(
            clean_BL,
            noisy_BL,
            masked_BL,
            alpha_B1,
            dalpha_B1,
            token_count=int(noised_tokens(batch, length).sum()),
            low_variance=low_variance,
        )
        targets = scaled(reordered(targets, order_BL), context.global_batch_size / num_diffusion)
        inputs = ModelInputs(
            token_ids_BL=targets.noisy_BL,
            position_ids_BL=torch.from_numpy(order_BL),
            sigma_B=torch.zeros(len(clean_BL)),
        )
        return inputs, targets

    def _sequential(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Mask with probability 1 - alpha_0; each masked token is predicted from all that is before it.

        The order has prompts, then clean tokens, each at random, then the masked ones from left to right.
        """
        config = self._config
        clean_BL = clean_tokens(batch, context, config)
        batch_size, length = clean_BL.shape
        alpha_B1 = np.full((batch_size, 1), config.alpha_0)
        uniform_BL = coins(batch, context, "esolm/sequential-mask", length)
        noisy_BL, masked_BL = absorb(clean_BL, alpha_B1, uniform_BL, self._mask_token_id)
        random_BL = CLEAN_KEYS * context.noise.uniform("esolm/sequential-order", batch.sample_indices, length)
        key_BL = np.where(masked_BL, 1.0 + np.arange(length), random_BL - ~noised_tokens(batch, length))
        order_BL = np.argsort(key_BL, axis=1, kind="stable")
        targets = weighted_targets(
            clean_BL,
            noisy_BL,
            alpha_B1,
            masked_BL.astype(np.float64),
            token_count=int(noised_tokens(batch, length).sum()),
        )
        num_sequential = context.global_batch_size - config.num_diffusion(context.global_batch_size)
        targets = scaled(reordered(targets, order_BL), context.global_batch_size / num_sequential)
        return append_clean(targets, torch.from_numpy(order_BL), block_size=1)
