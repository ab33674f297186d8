"""NELBO of noisy sequences under an exported model, in one process without process groups.

Shape legend: B sequences, S positions of the network, R rows that carry a loss, D hidden size, V ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dlm.families.base import Objective
from megatron_dlm.interfaces import AttentionPattern, ModelInputs, Targets, Vocabulary
from megatron_dlm.models.head_chunks import rows_per_chunk
from megatron_dlm.models.visibility import visibility
from megatron_dlm.platform.vocab_parallel import VocabShard


class ExportedBounds:
    """Scores noisy sequences with one exported model."""

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        attention: AttentionPattern,
        asked_rows_per_chunk: int | None,
    ) -> None:
        """Prepare.

        Args:
            model: exported model, in evaluation mode.
            vocabulary: token ids of the model.
            attention: attention pattern of the model's family.
            asked_rows_per_chunk: most rows whose logits are in memory at once; None: what suits the device.
        """
        self._model = model
        self._vocab = VocabShard.of_rank(vocabulary, 0, None, 1)
        self._attention = attention
        self._rows_per_chunk = rows_per_chunk(asked_rows_per_chunk, vocabulary.size, model.device.type)

    @torch.no_grad()
    def __call__(self, inputs: ModelInputs, targets: Targets, objective: Objective) -> NDArray[np.float64]:
        """NELBO of each noisy sequence, summed over its tokens.

        Args:
            inputs: inputs of the network.
            targets: targets of the same sequences.
            objective: objective whose weighted losses are summed.

        Returns:
            float64 [B] nats.
        """
        device = self._model.device
        inputs = inputs.to(device)
        wanted_BS = targets.weight_BL > 0
        hidden_RD = self._model.hidden(
            inputs.token_ids_BL, inputs.sigma_B, inputs.position_ids_BL, self._visible(inputs)
        )[wanted_BS.to(device)]
        all_rows = targets.rows(lambda values_BS: values_BS[wanted_BS])
        nats_BS = torch.zeros(wanted_BS.shape, dtype=torch.float64)
        losses = []
        for start in range(0, len(hidden_RD), self._rows_per_chunk):
            part = slice(start, start + self._rows_per_chunk)
            rows = all_rows.part(part).each(lambda values_R: values_R.to(device))
            logits_RV = self._model.output_layer.head(hidden_RD[part])
            losses.append(objective.loss_and_dlogits(logits_RV, rows, self._vocab)[0].double().cpu())
        if losses:
            nats_BS[wanted_BS] = torch.cat(losses) * all_rows.bound_weight_R
        found: NDArray[np.float64] = nats_BS.sum(1).numpy()
        return found

    def _visible(self, inputs: ModelInputs) -> torch.Tensor | None:
        """Dense attention mask, or None if the family's own attention pattern applies."""
        mask = visibility(inputs, self._attention)
        return None if mask is None else mask.dense()
