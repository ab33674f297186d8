"""Context parallelism: each rank holds two parts of every sequence, and attention gathers keys and values.

Rank r of n holds parts r and 2 n - 1 - r of the 2 n equal parts of a sequence, first the earlier one; under
causal attention all ranks then look at equally many keys ("zig-zag", as Megatron-LM and transformer-engine).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_dlm.interfaces import ModelInputs, Targets, TokenMixture
from megatron_dlm.models.visibility import own_queries


def own_parts(rank: int, size: int) -> tuple[int, int]:
    """The two parts, of 2 x `size`, that context parallel rank `rank` holds."""
    return rank, 2 * size - 1 - rank


def own_positions(length: int, rank: int, size: int) -> Tensor:
    """Positions of one rank.

    Args:
        length: S, positions of the sequence; where there are several ranks a multiple of 2 x `size`.
        rank: context parallel rank.
        size: context parallel size.

    Returns:
        int64 [S / size], increasing.
    """
    if size == 1:
        return torch.arange(length)
    return torch.cat([torch.arange(length).chunk(2 * size)[part] for part in own_parts(rank, size)])


def own_share(inputs: ModelInputs, targets: Targets, rank: int, size: int) -> tuple[ModelInputs, Targets]:
    """Cut a microbatch to one context parallel rank's positions.

    Args:
        inputs: model inputs for S positions, on the CPU.
        targets: targets for the same positions.
        rank: context parallel rank.
        size: context parallel size; 1 returns the arguments unchanged.

    Returns:
        Inputs and targets for S / size positions; an attention mask keeps all keys and document ids keep all
        positions. The token count is that of the whole microbatch on rank 0, and 0 on other ranks.
    """
    if size == 1:
        return inputs, targets
    own = own_positions(inputs.token_ids_BL.shape[1], rank, size)
    mask, mixture = inputs.attention_mask, inputs.mixture
    if mixture is not None:
        mixture = TokenMixture(
            token_ids_BLk=mixture.token_ids_BLk[:, own], weights_BLk=mixture.weights_BLk[:, own]
        )
    inputs = replace(
        inputs,
        token_ids_BL=inputs.token_ids_BL[:, own],
        position_ids_BL=inputs.position_ids_BL[:, own],
        attention_mask=None if mask is None else own_queries(mask, own),
        mixture=mixture,
    )
    targets = targets.each(lambda values_BL: values_BL[:, own])
    return inputs, replace(targets, token_count=0 if rank else targets.token_count)
