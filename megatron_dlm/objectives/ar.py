"""AR: next-token prediction over the same blocks, exact NLL (arXiv:2602.15014, baseline)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_dlm.interfaces import AttentionPattern, ModelInputs, RowTargets, Targets, TokenBatch, Vocabulary
from megatron_dlm.objectives.base import CorruptionContext, Objective, ObjectiveConfig
from megatron_dlm.objectives.cross_entropy import cross_entropy, cross_entropy_and_dlogits
from megatron_dlm.platform.vocab_parallel import VocabShard


@dataclass(frozen=True, kw_only=True)
class ARConfig(ObjectiveConfig):
    """Autoregressive baseline."""

    name: ClassVar[str] = "ar"
    attention: ClassVar[AttentionPattern] = AttentionPattern.CAUSAL

    def build(self, vocabulary: Vocabulary) -> Objective:
        """The family over `vocabulary`."""
        return AR()


class AR(Objective):
    """Predict each next token; the last one is the block's look-ahead, so L tokens are scored."""

    def corrupt(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Shift by one; nothing is drawn."""
        batch_size, length = batch.token_ids[:, :-1].shape
        ones_BL = torch.ones(batch_size, length)
        inputs = ModelInputs(
            token_ids_BL=batch.token_ids[:, :-1].contiguous(),
            position_ids_BL=torch.arange(length)[None],
            sigma_B=torch.zeros(batch_size),
        )
        targets = Targets(
            clean_BL=batch.token_ids[:, 1:].contiguous(),
            weight_BL=ones_BL,
            bound_weight_BL=ones_BL,
            token_count=ones_BL.numel(),
        )
        return inputs, targets

    def token_losses(self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard) -> Tensor:
        """Cross-entropy of the next token."""
        return cross_entropy(logits_RVp, targets.clean_R, vocab)

    def loss_and_dlogits(
        self, logits_RVp: Tensor, targets: RowTargets, vocab: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy with its closed-form gradient."""
        return cross_entropy_and_dlogits(logits_RVp, targets.clean_R, vocab)
