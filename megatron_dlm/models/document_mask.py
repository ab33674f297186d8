"""Who may look at whom where a block's documents do not see each other."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dlm.interfaces import AttentionPattern


def document_mask(
    document_ids_BL: Tensor, family_mask: Tensor | None, pattern: AttentionPattern, queries: Tensor
) -> Tensor:
    """The family's mask, or else its pattern, inside each document.

    Args:
        document_ids_BL: int64 [B, S], of all positions.
        family_mask: bool [1, 1, s, S] of the queries, or None.
        pattern: where there is no mask.
        queries: int64 [s], positions that are asked for, increasing.

    Returns:
        bool [B, 1, s, S], True where a query (row) may look at a key.
    """
    mask = document_ids_BL[:, queries, None] == document_ids_BL[:, None]
    if family_mask is not None:
        return mask[:, None] & family_mask
    if pattern == AttentionPattern.CAUSAL:
        mask &= queries[:, None] >= torch.arange(document_ids_BL.shape[1], device=queries.device)
    return mask[:, None]
