"""Drawing ids from weights, and cutting off the tail of a distribution.

Shape legend: ... any leading dimensions, V ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

GUARD = 1e-10
"""Keeps logarithms finite; as in the paper's code (arXiv:2602.15014)."""


def draw_categorical(weights: Tensor, uniform: Tensor) -> Tensor:
    """The id that wins w_v / -ln(u_v), distributed as the normalised weights.

    Exponential race, the same as Gumbel-max without its logarithm of the weights; draw in float64, since
    float32 cuts the noise's tail and so lowers the temperature.

    Args:
        weights: [..., V], at least 0, need not add up to 1.
        uniform: [..., V] draws in [0, 1), of the same dtype.

    Returns:
        int64 [...].
    """
    return (weights / (GUARD - (uniform + GUARD).log())).argmax(dim=-1)


def keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits of the most likely ids that together hold `top_p`, -inf elsewhere.

    Args:
        logits: [..., V].
        top_p: in (0, 1]; an id is kept where those before it hold at most this, so one always is.

    Returns:
        [..., V], not renormalised.
    """
    ordered, ids = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    return torch.where((before > top_p).scatter(-1, ids, before > top_p), float("-inf"), logits)
