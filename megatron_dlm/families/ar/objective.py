"""AR: next-token prediction over the same blocks, exact NLL (arXiv:2602.15014, baseline)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.families.base import CrossEntropyObjective, Objective, ObjectiveConfig
from megatron_dlm.interfaces import AttentionPattern, ModelInputs, Targets, TokenBatch, Vocabulary


@dataclass(frozen=True, kw_only=True)
class ARConfig(ObjectiveConfig):
    """Autoregressive baseline: predicts the next token."""

    name: ClassVar[str] = "ar"
    attention: ClassVar[AttentionPattern] = AttentionPattern.CAUSAL
    predicts_next_token: ClassVar[bool] = True

    def build(self, vocabulary: Vocabulary) -> Objective:
        """The family over `vocabulary`."""
        return AR()


class AR(CrossEntropyObjective):
    """Predict each next token; the last one is the block's look-ahead, so L tokens are scored."""

    def corrupt(self, batch: TokenBatch, context: CorruptionContext) -> tuple[ModelInputs, Targets]:
        """Shift by one; nothing is drawn."""
        seen_BL = batch.token_ids[:, :-1].contiguous()
        ones_BL = torch.ones(seen_BL.shape, dtype=torch.float64)
        weight_BL = ones_BL if batch.loss_mask is None else batch.loss_mask[:, 1:].double()
        inputs = ModelInputs(
            token_ids_BL=seen_BL,
            position_ids_BL=torch.arange(seen_BL.shape[1])[None],
            sigma_B=torch.zeros(len(seen_BL)),
        )
        targets = Targets(
            clean_BL=batch.token_ids[:, 1:].contiguous(),
            noisy_BL=seen_BL,
            alpha_BL=ones_BL,
            weight_BL=weight_BL,
            bound_weight_BL=weight_BL,
            token_count=int((weight_BL > 0).sum()),
        )
        return inputs, targets
