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
from megatron_dlm.interfaces import InputError, ModelInputs, Targets, TokenBatch, Vocabulary


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
    shift: bool = False
    """Predict a masked token at the position before it, as an AR model does from whose weights a run may
    start. The first token of a sample is then always given; with documents, the first ones of the others are
    predicted from the document before, as AR's are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift and self.ssl_ratio:
            raise InputError(
                f"objective.ssl_ratio: {self.ssl_ratio}, and objective.shift reads whole samples"
            )

    @property
    def needs_first_token(self) -> bool:
        """With `shift`, whose first position has none before it."""
        return self.shift

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
        # With the look-ahead token, which the last position predicts.
        clean_BL = batch.token_ids.numpy() if config.shift else clean_tokens(batch, context, config)
        t_B1 = stratified_times(
            batch.sample_indices, context, time_epsilon=config.time_epsilon, order=config.time_order
        )
        alpha_B1, dalpha_B1 = alpha_and_slope(config.noise_schedule, t_B1)
        length = clean_BL.shape[1]
        uniform_BL, noised_BL = coins(batch, context, "mask", length), noised_tokens(batch, length)
        if config.shift:
            uniform_BL[:, 0] = 1.0
            noised_BL = noised_BL[:, 1:]
        noisy_BL, masked_BL = absorb(clean_BL, alpha_B1, uniform_BL, self._mask_token_id)
        seen_BL = noisy_BL
        if config.shift:
            seen_BL = np.ascontiguousarray(noisy_BL[:, :-1])
            clean_BL, noisy_BL, masked_BL = clean_BL[:, 1:].copy(), noisy_BL[:, 1:].copy(), masked_BL[:, 1:]
        targets = masked_targets(
            clean_BL,
            noisy_BL,
            masked_BL,
            alpha_B1,
            dalpha_B1,
            token_count=int(noised_BL.sum()),
            low_variance=context.training and config.loss == "low-variance",
        )
        sigma_B = -np.log(alpha_B1[:, 0]) if config.time_conditioning else np.zeros(len(clean_BL))
        inputs = ModelInputs(
            token_ids_BL=torch.from_numpy(seen_BL),
            position_ids_BL=torch.arange(seen_BL.shape[1])[None],
            sigma_B=torch.from_numpy(sigma_B).float(),
        )
        return inputs, targets
