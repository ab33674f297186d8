"""Attention under a block table: torch's FlexAttention, compiled once for all masks of one shape.

Blocks without visible pairs are passed over, and a dense mask never exists. On a CPU it has no gradient, and
kernels of its own, which read the lists of blocks in another way than those for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_dlm.models.block_table import BLOCK, BlockTable, unpack_table


def attend_by_table(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """Attend.

    Args:
        query: [b, n, s, h].
        key: [b, n, S, h].
        value: [b, n, S, h].
        table: int32 [b or 1, numbers] from `block_table.pack_table`, on the tensors' device.

    Returns:
        [b, n, s, h].
    """
    mask = block_mask(unpack_table(table, query.shape[2], key.shape[2]))
    out: Tensor = _compiled()(query, key, value, block_mask=mask)
    return out


@cache
def _compiled() -> Callable[..., Any]:
    # Whole or not at all: what cannot be compiled would be computed with a dense mask, and nobody be told.
    return torch.compile(flex_attention, fullgraph=True)


def block_mask(table: BlockTable) -> BlockMask:
    """Convert a block table to FlexAttention's BlockMask.

    Args:
        table: block table of one microbatch.

    Returns:
        The mask, which broadcasts over heads.
    """

    def per_head(numbers: Tensor) -> Tensor:
        # FlexAttention's kernels for GPUs take sequences to follow each other, whatever the stride says.
        return numbers[:, None].contiguous()

    return BlockMask(
        seq_lengths=(table.queries.shape[2], table.keys.shape[2]),
        kv_num_blocks=per_head(table.kv_num_blocks),
        kv_indices=per_head(table.kv_indices),
        full_kv_num_blocks=per_head(table.full_kv_num_blocks),
        full_kv_indices=per_head(table.full_kv_indices),
        q_num_blocks=per_head(table.q_num_blocks),
        q_indices=per_head(table.q_indices),
        full_q_num_blocks=per_head(table.full_q_num_blocks),
        full_q_indices=per_head(table.full_q_indices),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_visible(table.queries, table.keys),
    )


def _visible(queries: Tensor, keys: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`AttentionMask.dense` for one pair."""
    is_shared = queries.shape[0] == 1

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = b * 0 if is_shared else b
        same_document = queries[row, 2, q] == keys[row, 2, k]
        return same_document & (
            (keys[row, 0, k] <= queries[row, 0, q]) | (keys[row, 1, k] == queries[row, 1, q])
        )

    return visible
