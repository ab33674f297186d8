"""Drawing ids from logits: temperature, nucleus (top-p) sampling, one uniform draw per row.

Shape legend: ... any leading dimensions, R rows, D hidden size, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Most bytes of float64 probabilities held at once, by device: fits a CPU's cache, keeps a GPU busy."""


@dataclass(frozen=True)
class Sharpening:
    """Temperature and nucleus (top-p) applied to the network's distribution before a draw."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely id (greedy)."""
    top_p: float = 1.0
    """Probability mass of the nucleus that is kept, in (0, 1]; 1 keeps all ids."""

    def __call__(self, logits: Tensor) -> Tensor:
        """float64 [..., V] probabilities from [..., V] logits."""
        logits = logits.double()
        if self.temperature == 0:
            best = torch.zeros_like(logits)
            return best.scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        if self.temperature != 1:
            logits = logits / self.temperature
        return (logits if self.top_p == 1 else keep_nucleus(logits, self.top_p)).softmax(-1)


def keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Nucleus (top-p) filter: keep the logits of the most likely ids that together hold `top_p`, else -inf.

    Args:
        logits: [..., V].
        top_p: in (0, 1]; an id is kept if all more likely ids together hold at most this probability, so
            at least one id is kept.

    Returns:
        [..., V] logits, not renormalised.
    """
    ordered, ids = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    return torch.where((before > top_p).scatter(-1, ids, before > top_p), float("-inf"), logits)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw an id with probability proportional to its weight, by inverting the cumulative sum.

    Takes one uniform number per row, so noise is cheap; an id of weight 0 is never drawn.

    Args:
        weights: float64 [..., V], at least 0, need not add up to 1.
        uniform: float64 [...] draws in [0, 1).

    Returns:
        int64 [...] ids.
    """
    sums = weights.cumsum(-1)
    total = sums[..., -1:]
    # A product that rounds up to the total would pass every id.
    wanted = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, wanted, right=True)[..., 0]


def logit_chunks(
    head: Callable[[Tensor], Tensor], hidden_RD: Tensor, vocab_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of rows, in chunks of at most `CHUNK_BYTES`.

    Args:
        head: function from [r, D] hidden states to [r, V] logits.
        hidden_RD: [R, D] hidden states.
        vocab_size: V, the number of ids.

    Yields:
        Slice of the chunk's rows, and their [r, V] logits.
    """
    size = max(1, CHUNK_BYTES[hidden_RD.device.type] // (8 * vocab_size))
    for start in range(0, len(hidden_RD), size):
        part = slice(start, start + size)
        yield part, head(hidden_RD[part])
