"""The attention mask of a noisy text with a clean copy behind it."""

from __future__ import annotations

from functools import lru_cache

import torch

from megatron_dlm.attention_mask import AttentionMask


@lru_cache(maxsize=8)
def noisy_then_clean_mask(length: int, block_size: int) -> AttentionMask:
    """Who may look at whom in [noisy ; clean], cut into blocks alike.

    A noisy position sees its own noisy block and the clean blocks before it; a clean one those up to its own.

    Args:
        length: L, positions of one half.
        block_size: tokens of a block.

    Returns:
        Of 2 L positions.
    """
    block = torch.arange(length, dtype=torch.int32) // block_size
    return AttentionMask.of(
        reach=torch.cat([block - 1, block]),
        query_group=torch.cat([block, torch.full_like(block, -2)]),
        order=torch.cat([torch.full_like(block, AttentionMask.NEVER), block]),
        key_group=torch.cat([block, torch.full_like(block, -1)]),
    )
