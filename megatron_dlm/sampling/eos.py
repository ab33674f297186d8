"""Early stopping: sequences whose text has ended with <eos>."""

from __future__ import annotations

import torch
from torch import Tensor


def finish_ended(ids_BL: Tensor, known_BL: Tensor, given_BL: Tensor, eos_token_id: int) -> Tensor:
    """Fill a sequence with <eos> after its first sampled <eos>, once all tokens before that one are known.

    Args:
        ids_BL: int64 [B, L]; changed in place.
        known_BL: bool [B, L], False where a token is still to be sampled; changed in place.
        given_BL: bool [B, L], True where a token was given and is kept.
        eos_token_id: id of <eos>, the token that ends a text.

    Returns:
        bool [B], True for sequences that have ended.
    """
    places = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    length = ids_BL.shape[1]
    ends_BL = (ids_BL == eos_token_id) & known_BL & ~given_BL
    first_end_B = torch.where(ends_BL, places, length).amin(1)
    first_unknown_B = torch.where(known_BL, length, places).amin(1)
    ended_B = first_end_B < first_unknown_B
    behind_BL = ended_B[:, None] & (places > first_end_B[:, None])
    ids_BL.masked_fill_(behind_BL & ~given_BL, eos_token_id)
    known_BL |= behind_BL
    return ended_B
