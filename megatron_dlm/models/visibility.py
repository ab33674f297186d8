"""Which pairs of positions see each other in a microbatch: pattern, family mask and documents in one.

Shape legend: B microbatch sequences, or 1 where all are alike; s queries, S keys, Q and K blocks of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dlm.attention_mask import AttentionMask
from megatron_dlm.interfaces import AttentionPattern, ModelInputs
from megatron_dlm.models.block_table import pack_table


@dataclass(frozen=True)
class MaskForms:
    """Mask forms that the layers' attention accepts instead of a dense mask."""

    edges: bool = False
    """Attention accepts packed documents, given by the document edges (cu_seqlens)."""
    table: bool = False
    """Attention accepts a block table (FlexAttention)."""


def with_one_mask(inputs: ModelInputs, pattern: AttentionPattern, forms: MaskForms) -> ModelInputs:
    """Merge the document ids of the inputs into their attention mask.

    Args:
        inputs: model inputs for all positions, on the CPU.
        pattern: attention pattern of the model family.
        forms: mask forms that the layers' attention accepts.

    Returns:
        Equivalent inputs without document ids; the mask has document edges if the attention accepts them.
    """
    mask, documents_BS = visibility(inputs, pattern), inputs.document_ids_BL
    if mask is not None and documents_BS is not None and forms.edges and inputs.attention_mask is None:
        mask = replace(mask, edges=document_edges(documents_BS))
    return replace(inputs, attention_mask=mask, document_ids_BL=None)


def with_table(inputs: ModelInputs) -> ModelInputs:
    """Add the block table to the attention mask of the inputs, if there is a mask and it has no edges.

    Args:
        inputs: model inputs for the positions that this rank holds, on the CPU.

    Returns:
        Equivalent inputs.
    """
    mask = inputs.attention_mask
    if mask is None or mask.edges is not None:
        return inputs
    return replace(inputs, attention_mask=replace(mask, table=pack_table(mask)))


def visibility(inputs: ModelInputs, pattern: AttentionPattern) -> AttentionMask | None:
    """The attention mask of a microbatch: which keys each query attends to.

    Args:
        inputs: model inputs for all positions; if they carry a mask, it replaces `pattern`.
        pattern: attention pattern of the model family.

    Returns:
        The mask, restricted to documents if the inputs have document ids; None if `pattern` alone applies.
    """
    mask, documents_BS = inputs.attention_mask, inputs.document_ids_BL
    if documents_BS is None:
        return mask
    if mask is None:
        mask = pattern_mask(pattern, documents_BS.shape[1], documents_BS.device)
    return within_documents(mask, documents_BS)


def pattern_mask(pattern: AttentionPattern, length: int, device: torch.device | None = None) -> AttentionMask:
    """The attention mask that corresponds to a pattern.

    Args:
        pattern: causal or bidirectional.
        length: S, number of positions.
        device: device to create the mask on.

    Returns:
        The mask; its queries and keys are [1, 3, S].
    """
    places = torch.arange(length, dtype=torch.int32, device=device)
    order = places if pattern == AttentionPattern.CAUSAL else torch.zeros_like(places)
    return AttentionMask.of(reach=order, order=order)


def within_documents(mask: AttentionMask, documents_BS: Tensor) -> AttentionMask:
    """Restrict a mask to pairs of positions in the same document.

    Args:
        mask: attention mask of all positions.
        documents_BS: int64 [B, S], document id of each position.

    Returns:
        The restricted mask; its queries and keys are [B, 3, S].
    """
    # Of a shard's millions of documents a sample has few.
    numbers_BS = (documents_BS - documents_BS.amin(dim=1, keepdim=True)).int()
    size = len(documents_BS)
    queries, keys = (part.expand(size, -1, -1).clone() for part in (mask.queries, mask.keys))
    queries[:, 2], keys[:, 2] = numbers_BS, numbers_BS
    return replace(mask, queries=queries, keys=keys)


def own_queries(mask: AttentionMask, own: Tensor) -> AttentionMask:
    """The mask restricted to some queries; all keys stay.

    Args:
        mask: attention mask of all positions.
        own: int64 [s], indices of the queries to keep.

    Returns:
        The mask of the s queries and all S keys.
    """
    return replace(mask, queries=mask.queries[:, :, own])


def document_edges(documents_BS: Tensor) -> Tensor | None:
    """First positions of the documents when all samples are laid end to end.

    Args:
        documents_BS: int64 [B, S], on the CPU.

    Returns:
        int32 [documents + 1] with the end of the last; None where positions are in an order that scatters
        documents.
    """
    step_BS = documents_BS.diff(dim=1)
    if (step_BS < 0).any():
        return None
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = step_BS != 0
    begins = begins_BS.flatten().nonzero()[:, 0]
    return torch.cat([begins, begins.new_tensor([documents_BS.numel()])]).int()


def visible_pairs(mask: AttentionMask) -> int:
    """Pairs of query and key that a mask lets through, without looking at each.

    Args:
        mask: on the CPU.

    Returns:
        Their number, over the rows that the mask has.
    """
    total = 0
    for queries, keys in zip(mask.queries.numpy(), mask.keys.numpy(), strict=True):
        # By document, then by what is compared: a query sees a beginning of its document's keys.
        reached = np.sort(_pair(keys[2], keys[0]))
        firsts = _pair(queries[2], np.full_like(queries[2], np.iinfo(np.int32).min))
        seen = np.searchsorted(reached, _pair(queries[2], queries[0]), side="right")
        total += int((seen - np.searchsorted(reached, firsts, side="left")).sum())
        groups = np.sort(_pair(keys[2], keys[1])[keys[0] == AttentionMask.NEVER])
        wanted = _pair(queries[2], queries[1])
        alike = np.searchsorted(groups, wanted, side="right") - np.searchsorted(groups, wanted, side="left")
        total += int(alike.sum())
    return total


def _pair(high: NDArray[np.int32], low: NDArray[np.int32]) -> NDArray[np.int64]:
    """Two numbers as one that sorts by the first, then the second."""
    return (high.astype(np.int64) << 32) + (low.astype(np.int64) - np.iinfo(np.int32).min)
