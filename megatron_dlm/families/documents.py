"""Packed documents that do not attend to each other: a family's corruption, then per-document positions.

A prompt with its response is one such document.
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
    """Corrupt a batch; with document ids, attention stays inside a document and positions restart in it.

    The noise is drawn for the whole block. Families that predict the next token, AR and MDLM with `shift`,
    predict a document's first one from the document before.

    Args:
        objective: objective of the family.
        batch: one part of a microbatch, see `Objective.split`.
        context: address of the random draws.

    Returns:
        Inputs of the denoiser and targets of the loss.
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
    """Position at which each token's document begins.

    Args:
        document_ids_BL: int64 [B, L], non-decreasing along a row.

    Returns:
        int64 [B, L] first positions.
    """
    first = torch.ones_like(document_ids_BL, dtype=torch.bool)
    first[:, 1:] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    starts_BL = torch.arange(document_ids_BL.shape[1]) * first
    return starts_BL.cummax(dim=1).values
