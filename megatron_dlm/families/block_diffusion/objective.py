"""BD3-LM: block diffusion (arXiv:2503.09573), masked diffusion inside blocks, autoregressive over blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.diffusion.corruptions import absorb, coins, noised_tokens
from megatron_dlm.diffusion.noise_schedules import alpha_and_slope
from megatron_dlm.diffusion.targets import append_clean, masked_targets
from megatron_dlm.diffusion.time_sampling import stratified_times
from megatron_dlm.families.base import CrossEntropyObjective, Objective
from megatron_dlm.families.diffusion_family import DiffusionConfig, MaskedLoss, clean_tokens
from megatron_dlm.interfaces import AttentionPattern, InputError, ModelInputs, Targets, TokenBatch, Vocabulary


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionConfig(DiffusionConfig):
    """Block diffusion: blocks left to right, masked diffusion within each (arXiv:2503.09573)."""

    name: ClassVar[str] = "block-diffusion"
    attention: ClassVar[AttentionPattern] = AttentionPattern.BIDIRECTIONAL
    has_one_time: ClassVar[bool] = False
    # Its blocks begin with the sample, not with each document.
    takes_document_masks: ClassVar[bool] = False
    can_change: ClassVar[tuple[str, ...]] = (*DiffusionConfig.can_change, "loss", "block_size")

    block_size: int = 16
    """Tokens per block. The sequence length gives MDLM; 1 gives a bound equal to the sequential
    likelihood."""
    loss: MaskedLoss = "elbo"
    """Training weight of a masked token. elbo: -alpha'/(1 - alpha), as in the NELBO; low-variance: 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise InputError(f"objective.block_size: {self.block_size} is below 1")

    @property
    def text_multiple(self) -> int:
        """Block size: a text is padded to whole blocks."""
        return self.block_size

    def check_sizes(self, batch_size: int, seq_length: int) -> None:
        """Refuse a sequence length that the block size does not divide."""
        if seq_length % self.block_size:
            raise InputError(
                f"objective.block_size: {self.block_size} does not divide data.seq_length {seq_length}"
            )

    def build(self, vocabulary: Vocabulary) -> Objective:
        """The family over `vocabulary`."""
        return BlockDiffusion(self, vocabulary.mask_token_id)


class BlockDiffusion(CrossEntropyObjective):
    """Each block has its own diffusion time and attends to its noisy self and the clean blocks before it."""

    def __init__(self, config: BlockDiffusionConfig, mask_token_id: int) -> None:
        self._config = config
        self._mask_token_id = mask_token_id

    def corrupt(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Mask each block at its own time; the network reads [x_t ; x_0]."""
        config = self._config
        clean_BL = clean_tokens(batch, context, config, multiple=config.block_size)
        length = clean_BL.shape[1]
        times = stratified_times(
            batch.sample_indices,
            context,
            time_epsilon=config.time_epsilon,
            order=config.time_order,
            per_sample=length // config.block_size,
        )
        alpha_BL, dalpha_BL = (
            np.repeat(values, config.block_size, axis=1)
            for values in alpha_and_slope(config.noise_schedule, times)
        )
        uniform_BL = coins(batch, context, "mask", length)
        noisy_BL, masked_BL = absorb(clean_BL, alpha_BL, uniform_BL, self._mask_token_id)
        low_variance = context.training and config.loss == "low-variance"
        targets = masked_targets(
            clean_BL,
            noisy_BL,
            masked_BL,
            alpha_BL,
            dalpha_BL,
            token_count=int(noised_tokens(batch, length).sum()),
            low_variance=low_variance,
        )
        return append_clean(targets, torch.arange(length)[None], block_size=config.block_size)
