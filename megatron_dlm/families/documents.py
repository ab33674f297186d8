"""Blocks whose documents do not see each other: the corruption of a family, then each document by itself.

Prompts with their responses are such documents.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.families.base import Objective
from megatron_dlm.interfaces import ModelInputs, Targets, TokenBatch


def corrupt(
    objective: Objective, batch: TokenBatch, context: CorruptionContext
) -> tuple[ModelInputs, Targets]:
    """The family's corruption; where the batch knows its documents, attention and positions are theirs.

    The noise is that of the whole block. AR still predicts a document's first token, from the one before it.

    Args:
        objective: the family.
        batch: one part of a microbatch, see `Objective.split`.
        context: address of the draws.

    Returns:
        What the denoiser reads and what the loss needs.
    """
    inputs, targets = objective.corrupt(batch, context)
    if batch.document_ids is None:
        return inputs, targets
    # A family's position ids say which token of the block stands at each position of the network.
    tokens_BL = inputs.position_ids_BL.expand_as(inputs.token_ids_BL)
    inputs = replace(
        inputs,
        document_ids_BL=batch.document_ids.gather(1, tokens_BL),
        position_ids_BL=tokens_BL - document_starts(batch.document_ids).gather(1, tokens_BL),
    )
    return inputs, targets


def document_starts(document_ids_BL: Tensor) -> Tensor:
    """First position of the document that each token belongs to.

    Args:
        document_ids_BL: int64 [B, L], not falling along a row.

    Returns:
        int64 [B, L].
    """
    first = torch.ones_like(document_ids_BL, dtype=torch.bool)
    first[:, 1:] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    starts_BL = torch.arange(document_ids_BL.shape[1]) * first
    return starts_BL.cummax(dim=1).values
