"""Start of sampling: given tokens that are kept, as prompts or anywhere in the text (infilling).

Shape legend: B sequences, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.sampling.family_sampler import FamilySampler


@dataclass(frozen=True)
class Start:
    """Texts to fill in."""

    ids_BL: Tensor
    """int64 [B, L]; ids at positions that are not given are ignored."""
    given_BL: Tensor
    """bool [B, L], True where a token is given and kept."""

    def __post_init__(self) -> None:
        if self.ids_BL.dtype != torch.int64 or self.ids_BL.dim() != 2:
            raise ValueError(
                f"prompt: {self.ids_BL.dtype} {tuple(self.ids_BL.shape)} instead of int64 [B, L]"
            )
        if self.given_BL.dtype != torch.bool or self.given_BL.shape != self.ids_BL.shape:
            raise ValueError(
                f"given: {self.given_BL.dtype} {tuple(self.given_BL.shape)} instead of bool "
                f"{tuple(self.ids_BL.shape)}"
            )


def start_from(prompts: Sequence[Sequence[int]], length: int, family: FamilySampler) -> Start:
    """Texts that begin with prompts, which may be of unequal length.

    Args:
        prompts: token ids; an empty prompt is replaced by the family's default, which may be <bos>.
        length: tokens per text, prompt included.
        family: samplers of the network's family.

    Returns:
        Start of the batch.

    Raises:
        ValueError: a prompt longer than `length`.
    """
    ids = np.full((len(prompts), length), family.mask_token_id, dtype=np.int64)
    given = np.zeros((len(prompts), length), dtype=bool)
    for row, prompt in enumerate(prompts):
        tokens = list(prompt or family.empty_prompt)
        if len(tokens) > length:
            raise ValueError(f"prompt {row}: {len(tokens)} tokens exceed the length {length}")
        ids[row, : len(tokens)], given[row, : len(tokens)] = tokens, True
    return Start(torch.from_numpy(ids), torch.from_numpy(given))


def check_tokens(start: Start, family: FamilySampler) -> None:
    """Refuse given tokens that the family cannot start from.

    Args:
        start: texts to fill in.
        family: samplers of the network's family.

    Raises:
        ValueError: an id outside the vocabulary, the mask token, or gaps that the family cannot fill in.
    """
    given = start.ids_BL[start.given_BL]
    if bool(((given < 0) | (given >= family.vocab_size)).any()):
        raise ValueError(f"prompt: a token is outside [0, {family.vocab_size})")
    if bool((given == family.mask_token_id).any()):
        raise ValueError(f"prompt: contains the mask token {family.mask_token_id}")
    family.check_given(start.given_BL)
