"""Attention mask for a noisy sequence followed by its clean copy, [x_t ; x_0] as in BD3-LM."""

from __future__ import annotations

from functools import lru_cache

import torch

from megatron_dlm.attention_mask import AttentionMask


@lru_cache(maxsize=8)
def noisy_then_clean_mask(length: int, block_size: int) -> AttentionMask:
    """Attention mask over [noisy ; clean], both halves cut into the same blocks.

    A noisy position attends to its own noisy block and the clean blocks before it; a clean position to the
    clean blocks up to and including its own.

    Args:
        length: L, positions of one half.
        block_size: tokens per block.

    Returns:
        The mask over 2 L positions.
    """
    block = torch.arange(length, dtype=torch.int32) // block_size
    return AttentionMask.of(
        reach=torch.cat([block - 1, block]),
        query_group=torch.cat([block, torch.full_like(block, -2)]),
        order=torch.cat([torch.full_like(block, AttentionMask.NEVER), block]),
        key_group=torch.cat([block, torch.full_like(block, -1)]),
    )
