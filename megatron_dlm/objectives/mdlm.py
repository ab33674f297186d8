"""MDLM: masked (absorbing-state) diffusion (arXiv:2406.07524), trained as in arXiv:2602.15014."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.interfaces import (
    AttentionPattern,
    InputError,
    ModelInputs,
    RowTargets,
    Targets,
    TokenBatch,
    Vocabulary,
)
from megatron_dlm.objectives.base import CorruptionContext, Objective, ObjectiveConfig
from megatron_dlm.objectives.corruptions import absorb
from megatron_dlm.objectives.cross_entropy import cross_entropy, cross_entropy_and_dlogits
from megatron_dlm.objectives.schedules import log_linear_alpha, log_linear_dalpha
from megatron_dlm.objectives.time_sampling import stratified_times
from megatron_dlm.platform.vocab_parallel import VocabShard


@dataclass(frozen=True, kw_only=True)
class MDLMConfig(ObjectiveConfig):
    """Masked diffusion."""

    name: ClassVar[str] = "mdlm"
    attention: ClassVar[AttentionPattern] = AttentionPattern.BIDIRECTIONAL

    loss: Literal["low-variance", "elbo"] = "low-variance"
    """Training weight of a masked token: 1 (arXiv:2602.15014 eq. 8), or the NELBO's -alpha'/(1 - alpha)."""
    time_epsilon: float = 1e-3
    """Smallest diffusion time."""

    def __post_init__(self) -> None:
        if not 0 <= self.time_epsilon < 1:
            raise InputError(f"objective.time_epsilon: {self.time_epsilon} is outside [0, 1)")

    def build(self, vocabulary: Vocabulary) -> Objective:
        """The family over `vocabulary`."""
        return MDLM(self, vocabulary.mask_token_id)


class MDLM(Objective):
    """Predict masked tokens; visible ones carry no loss and never reach the head."""

    def __init__(self, config: MDLMConfig, mask_token_id: int) -> None:
        self._config = config
        self._mask_token_id = mask_token_id

    def corrupt(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Mask each token with probability 1 - alpha_t; the NELBO's weight is -alpha'_t / (1 - alpha_t)."""
        clean_BL = np.ascontiguousarray(batch.token_ids[:, :-1].numpy())
        t_B = stratified_times(batch.sample_indices, context, time_epsilon=self._config.time_epsilon)
        alpha_B, dalpha_B = log_linear_alpha(t_B), log_linear_dalpha(t_B)
        uniform_BL = context.noise.uniform("mdlm/mask", batch.sample_indices, clean_BL.shape[1])
        noisy_BL, masked_BL = absorb(clean_BL, alpha_B, uniform_BL, self._mask_token_id)
        bound_BL = np.where(masked_BL, (-dalpha_B / (1.0 - alpha_B))[:, None], 0.0).astype(np.float32)
        low_variance = context.training and self._config.loss == "low-variance"
        inputs = ModelInputs(
            token_ids_BL=torch.from_numpy(noisy_BL),
            position_ids_BL=torch.arange(clean_BL.shape[1])[None],
            # The network is not told the time: adaLN acts as learned constants.
            sigma_B=torch.zeros(len(clean_BL)),
        )
        targets = Targets(
            clean_BL=torch.from_numpy(clean_BL),
            weight_BL=torch.from_numpy(masked_BL.astype(np.float32) if low_variance else bound_BL),
            bound_weight_BL=torch.from_numpy(bound_BL),
            token_count=clean_BL.size,
        )
        return inputs, targets

    def token_losses(self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard) -> Tensor:
        """Cross-entropy of the clean token at a masked position."""
        return cross_entropy(logits_RVp, targets.clean_R, vocab)

    def loss_and_dlogits(
        self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy with its closed-form gradient."""
        return cross_entropy_and_dlogits(logits_RVp, targets.clean_R, vocab)
