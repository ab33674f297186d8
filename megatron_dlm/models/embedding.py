"""Token ids, or weighted few of them, to vectors; vocabulary-parallel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dlm.interfaces import TokenMixture
from megatron_dlm.models.denoiser_config import DenoiserConfig


class TokenEmbedding(VocabParallelEmbedding):
    """megatron-core's vocabulary-parallel embedding, extended to mixtures of tokens."""

    def __init__(
        self, num_embeddings: int, hidden_size: int, config: DenoiserConfig, tensor_group: ProcessGroup
    ) -> None:
        super().__init__(
            num_embeddings,
            hidden_size,
            init_method=_leave_uninitialised,
            config=config,
            tp_group=tensor_group,
            reduce_scatter_embeddings=config.sequence_parallel,
        )

    def forward(self, token_ids_BL: Tensor, mixture: TokenMixture | None = None) -> Tensor:
        """Embed.

        Args:
            token_ids_BL: int64 [B, L].
            mixture: what to embed in their place, if anything.

        Returns:
            [L, B, D] of the weights' dtype; under sequence parallelism this rank's part of the positions.
        """
        if mixture is None:
            embedded: Tensor = super().forward(token_ids_BL)
            return embedded if self.reduce_scatter_embeddings else embedded.transpose(0, 1)
        ids, start = mixture.token_ids_BLk, self.vocab_start_index
        present = (ids >= start) & (ids < start + self.weight.shape[0])
        bags = F.embedding_bag(
            torch.where(present, ids - start, 0).flatten(0, 1),
            self.weight,
            per_sample_weights=(mixture.weights_BLk * present).to(self.weight.dtype).flatten(0, 1),
            mode="sum",
        )
        bags_LBD = bags.unflatten(0, ids.shape[:2]).transpose(0, 1).contiguous()
        if self.reduce_scatter_embeddings:
            part: Tensor = reduce_scatter_to_sequence_parallel_region(bags_LBD, self.tp_group)
            return part
        mixed: Tensor = reduce_from_tensor_model_parallel_region(bags_LBD, self.tp_group)
        return mixed


def _leave_uninitialised(weight: Tensor) -> Tensor:
    return weight
