"""Masks for FlexAttention: which blocks of pairs are visible as a whole, in part or not at all.

Made from the numbers that a mask has for each position, on the CPU beside the noise; no [s, S] tensor exists.
Queries, keys and lists of blocks travel as one tensor, as megatron-core passes a layer's mask on.
Shape legend: B microbatch sequences, or 1 where all are alike; s queries, S keys, Q and K blocks of them.
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
    """[B, Q], key blocks that a query block sees a part of."""
    kv_indices: Tensor
    """[B, Q, K], those, then the others."""
    full_kv_num_blocks: Tensor
    """[B, Q], key blocks that it sees all of."""
    full_kv_indices: Tensor
    """[B, Q, K]."""
    q_num_blocks: Tensor
    """[B, K], the same by key block."""
    q_indices: Tensor
    """[B, K, Q]."""
    full_q_num_blocks: Tensor
    """[B, K]."""
    full_q_indices: Tensor
    """[B, K, Q]."""


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
    """Bool [B, Q, K], blocks with pairs of which some may be visible, and blocks with all pairs visible.

    By smallest and largest numbers of each block. A block of the first kind may turn out to have none, or
    all, where numbers of a block are not in order: that costs time, and its pairs are looked at one by one.
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
