"""Attention masks in compact form: three numbers per position instead of one per pair of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """Which keys each query sees, given by three numbers per position instead of one per pair.

    A query sees a key of the same document if the key's order is at most the query's reach, or if both have
    the same group. Keys with a group have the order NEVER. B is 1 if all sequences share one mask.
    """

    NEVER: ClassVar[int] = 2**31 - 1
    """Order of keys that are seen by their group alone."""

    queries: Tensor
    """int32 [B, 3, s]: reach, group and document."""
    keys: Tensor
    """int32 [B, 3, S]: order, group and document."""
    edges: Tensor | None = None
    """int32 [documents + 1] (cu_seqlens), for attention over packed documents: document starts in the
    concatenated samples, then the total length. Set only if the mask adds no more than documents to the
    family's pattern."""
    table: Tensor | None = None
    """int32 [B, numbers], from models/block_table.py, for attention that passes over blocks."""

    @classmethod
    def of(
        cls,
        *,
        reach: Tensor,
        order: Tensor,
        query_group: Tensor | None = None,
        key_group: Tensor | None = None,
    ) -> AttentionMask:
        """One mask shared by all sequences, without document boundaries.

        Args:
            reach: int32 [s], largest order that each query sees.
            order: int32 [S], order of each key.
            query_group: int32 [s], group of each query, below 0 for none; None: no query has a group.
            key_group: int32 [S], group of each key, below 0 for none; None: no key has a group.

        Returns:
            The mask, with B = 1.
        """
        # Queries without a group and keys without one are not of the same.
        without = (reach.new_full(reach.shape, -2), order.new_full(order.shape, -1))
        query_group = without[0] if query_group is None else query_group
        key_group = without[1] if key_group is None else key_group
        return cls(
            queries=_stacked(reach, query_group, reach.new_zeros(reach.shape)),
            keys=_stacked(order, key_group, order.new_zeros(order.shape)),
        )

    @classmethod
    def concat(cls, masks: Sequence[AttentionMask], sizes: Sequence[int]) -> AttentionMask:
        """Concatenate the masks of several batches.

        Args:
            masks: masks of equal sequence length, without edges or tables.
            sizes: number of sequences of each batch.

        Returns:
            One shared mask (B = 1) if all masks are shared and equal, otherwise one mask per sequence.

        Raises:
            ValueError: a mask has edges or a table, which are valid for its own batch only.
        """
        import torch

        if any(mask.edges is not None or mask.table is not None for mask in masks):
            raise ValueError("attention mask: with edges or a table it cannot be joined")
        first = masks[0]
        if len(first.queries) == 1 and all(
            torch.equal(mask.queries, first.queries) and torch.equal(mask.keys, first.keys) for mask in masks
        ):
            return first
        pairs = list(zip(masks, sizes, strict=True))
        return cls(
            queries=torch.cat([mask.queries.expand(size, -1, -1) for mask, size in pairs]),
            keys=torch.cat([mask.keys.expand(size, -1, -1) for mask, size in pairs]),
        )

    def sequences(self, part: slice) -> AttentionMask:
        """The mask of some of the sequences; unchanged if all sequences share one mask."""
        if len(self.queries) == 1:
            return self
        if self.edges is not None or self.table is not None:
            raise ValueError("attention mask: with edges or a table it cannot be divided")
        return type(self)(queries=self.queries[part], keys=self.keys[part])

    def dense(self) -> Tensor:
        """Bool [B, 1, s, S], True where a query (row) sees a key."""
        reach, group, document = (numbers[:, :, None] for numbers in self.queries.unbind(1))
        order, key_group, key_document = (numbers[:, None] for numbers in self.keys.unbind(1))
        return ((document == key_document) & ((order <= reach) | (group == key_group)))[:, None]


def _stacked(*rows: Tensor) -> Tensor:
    """[1, rows, positions], in the dtype of the first."""
    whole = rows[0].new_empty(1, len(rows), rows[0].shape[0])
    for number, row in enumerate(rows):
        whole[0, number] = row
    return whole
