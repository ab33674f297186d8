"""Block masks for FlexAttention: which blocks of (query, key) pairs are visible fully, partly or not at all.

Built on the CPU from the three numbers that a mask has per position; an [s, S] tensor is never built.
Queries, keys and block lists are packed into one tensor, since megatron-core passes one mask to each layer.
Shape legend: B microbatch sequences, or 1 if all share a mask; s queries in Q blocks, S keys in K blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dlm.attention_mask import AttentionMask

BLOCK = 128
"""Queries, and keys, of a block; FlexAttention's own choice."""
TABLE_DIM = 2
"""Dimensions of a table, by which attention tells it from other forms of a mask."""
_ALIGNMENT = 4
"""Numbers; where each part of the table begins, 16 bytes apart, as compiled code reads them."""


@dataclass(frozen=True)
class BlockTable:
    """The parts of a table; all int32."""

    queries: Tensor
    """[B, 3, s] of the mask."""
    keys: Tensor
    """[B, 3, S] of the mask."""
    kv_num_blocks: Tensor
    """[B, Q], number of key blocks that each query block sees in part."""
    kv_indices: Tensor
    """[B, Q, K], indices of those key blocks first, then of all other key blocks."""
    full_kv_num_blocks: Tensor
    """[B, Q], number of key blocks that each query block sees fully."""
    full_kv_indices: Tensor
    """[B, Q, K], indices of the fully visible key blocks first, then of all others."""
    q_num_blocks: Tensor
    """[B, K], number of query blocks that see part of each key block."""
    q_indices: Tensor
    """[B, K, Q], indices of those query blocks first, then of all others."""
    full_q_num_blocks: Tensor
    """[B, K], number of query blocks that see each key block fully."""
    full_q_indices: Tensor
    """[B, K, Q], indices of those query blocks first, then of all others."""


def _shapes(s: int, S: int) -> dict[str, tuple[int, ...]]:
    Q, K = -(-s // BLOCK), -(-S // BLOCK)
    return {
        "queries": (3, s),
        "keys": (3, S),
        "kv_num_blocks": (Q,),
        "kv_indices": (Q, K),
        "full_kv_num_blocks": (Q,),
        "full_kv_indices": (Q, K),
        "q_num_blocks": (K,),
        "q_indices": (K, Q),
        "full_q_num_blocks": (K,),
        "full_q_indices": (K, Q),
    }


def pack_table(mask: AttentionMask) -> Tensor:
    """The table of a mask.

    Args:
        mask: on the CPU.

    Returns:
        int32 [B, numbers], on the CPU.
    """
    queries, keys = mask.queries.numpy(), mask.keys.numpy()
    partial, full = _classify(queries, keys)
    parts = {"queries": queries, "keys": keys}
    for prefix, visible in (("", partial), ("full_", full)):
        for axis, seen in (("kv", visible), ("q", visible.swapaxes(1, 2))):
            parts[f"{prefix}{axis}_num_blocks"] = seen.sum(axis=2, dtype=np.int32)
            parts[f"{prefix}{axis}_indices"] = np.argsort(~seen, axis=2, kind="stable").astype(np.int32)
    columns = []
    for name in _shapes(queries.shape[2], keys.shape[2]):
        flat = parts[name].reshape(len(queries), -1)
        columns.append(np.pad(flat, ((0, 0), (0, -flat.shape[1] % _ALIGNMENT))))
    return torch.from_numpy(np.concatenate(columns, axis=1))


def unpack_table(table: Tensor, s: int, S: int) -> BlockTable:
    """The parts of a table, as views of it.

    Args:
        table: from `pack_table`, on any device.
        s: queries.
        S: keys.

    Returns:
        The parts.
    """
    parts, start = {}, 0
    for name, shape in _shapes(s, S).items():
        count = int(np.prod(shape))
        parts[name] = table[:, start : start + count].unflatten(1, shape)
        start += -(-count // _ALIGNMENT) * _ALIGNMENT
    return BlockTable(**parts)


def _classify(
    queries: NDArray[np.int32], keys: NDArray[np.int32]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two bool [B, Q, K]: blocks in which some pairs may be visible, and blocks with all pairs visible.

    Decided from the minimum and maximum of each block's numbers. If the numbers within a block are unsorted,
    a block of the first kind may in fact have no or all pairs visible: slower, but still correct, since the
    kernel tests its pairs one by one.
    """
    (reach_lo, group_lo, document_lo), (reach_hi, group_hi, document_hi) = _bounds(queries)
    (order_lo, kind_lo, text_lo), (order_hi, kind_hi, text_hi) = _bounds(keys)
    rows, columns = (slice(None), slice(None), None), (slice(None), None, slice(None))
    one_document = (document_lo == document_hi)[rows] & (text_lo == text_hi)[columns]
    one_document &= document_lo[rows] == text_lo[columns]
    one_group = (group_lo == group_hi)[rows] & (kind_lo == kind_hi)[columns]
    one_group &= group_lo[rows] == kind_lo[columns]
    full = one_document & ((order_hi[columns] <= reach_lo[rows]) | one_group)
    # A block beyond the last position is never whole.
    whole_rows = np.arange(1, full.shape[1] + 1) * BLOCK <= queries.shape[2]
    whole_columns = np.arange(1, full.shape[2] + 1) * BLOCK <= keys.shape[2]
    full &= whole_rows[:, None] & whole_columns
    share_document = (document_lo[rows] <= text_hi[columns]) & (text_lo[columns] <= document_hi[rows])
    share_group = (group_lo[rows] <= kind_hi[columns]) & (kind_lo[columns] <= group_hi[rows])
    seen = share_document & ((order_lo[columns] <= reach_hi[rows]) | share_group)
    return seen & ~full, full


def _bounds(
    numbers: NDArray[np.int32],
) -> tuple[tuple[NDArray[np.int32], ...], tuple[NDArray[np.int32], ...]]:
    """Smallest and largest of each block, [B, blocks], of each of the three numbers."""
    starts = np.arange(0, numbers.shape[2], BLOCK)
    lo, hi = (ufunc.reduceat(numbers, starts, axis=2) for ufunc in (np.minimum, np.maximum))
    return tuple(lo.swapaxes(0, 1)), tuple(hi.swapaxes(0, 1))
