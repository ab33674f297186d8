"""MDLM: masked (absorbing-state) diffusion (arXiv:2406.07524), trained as in arXiv:2602.15014."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.diffusion.corruptions import absorb, coins, noised_tokens
from megatron_dlm.diffusion.noise_schedules import alpha_and_slope
from megatron_dlm.diffusion.targets import masked_targets
from megatron_dlm.diffusion.time_sampling import stratified_times
from megatron_dlm.families.base import CrossEntropyObjective, Objective
from megatron_dlm.families.diffusion_family import BidirectionalConfig, MaskedLoss, clean_tokens
from megatron_dlm.interfaces import ModelInputs, Targets, TokenBatch, Vocabulary


@dataclass(frozen=True, kw_only=True)
class MDLMConfig(BidirectionalConfig):
    """Masked diffusion (MDLM, arXiv:2406.07524)."""

    name: ClassVar[str] = "mdlm"
    can_change: ClassVar[tuple[str, ...]] = (*BidirectionalConfig.can_change, "loss")

    loss: MaskedLoss = "low-variance"
    """Training weight of a masked token. low-variance: 1 (arXiv:2602.15014 eq. 8); elbo: -alpha'/(1 - alpha),
    as in the NELBO."""
    time_conditioning: bool = False
    """Condition the network on the noise level. Off in the paper; adaLN then acts as learned constants."""

    def build(self, vocabulary: Vocabulary) -> Objective:
        """The family over `vocabulary`."""
        return MDLM(self, vocabulary.mask_token_id)


class MDLM(CrossEntropyObjective):
    """Predict masked tokens; visible ones carry no loss and never reach the head."""

    def __init__(self, config: MDLMConfig, mask_token_id: int) -> None:
        self._config = config
        self._mask_token_id = mask_token_id

    def corrupt(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Mask each token with probability 1 - alpha_t."""
        config = self._config
        clean_BL = clean_tokens(batch, context, config)
        t_B1 = stratified_times(
            batch.sample_indices, context, time_epsilon=config.time_epsilon, order=config.time_order
        )
        alpha_B1, dalpha_B1 = alpha_and_slope(config.noise_schedule, t_B1)
        uniform_BL = coins(batch, context, "mask", clean_BL.shape[1])
        noisy_BL, masked_BL = absorb(clean_BL, alpha_B1, uniform_BL, self._mask_token_id)
        low_variance = context.training and config.loss == "low-variance"
        targets = masked_targets(
            clean_BL,
            noisy_BL,
            masked_BL,
            alpha_B1,
            dalpha_B1,
            token_count=int(noised_tokens(batch, clean_BL.shape[1]).sum()),
            low_variance=low_variance,
        )
        sigma_B = -np.log(alpha_B1[:, 0]) if config.time_conditioning else np.zeros(len(clean_BL))
        inputs = ModelInputs(
            token_ids_BL=targets.noisy_BL,
            position_ids_BL=torch.arange(clean_BL.shape[1])[None],
            sigma_B=torch.from_numpy(sigma_B).float(),
        )
        return inputs, targets
