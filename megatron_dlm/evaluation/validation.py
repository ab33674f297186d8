"""Negative log-likelihood bound of held-out data, with common random numbers and an interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Likelihood:
    """NELBO (exact NLL for AR) of held-out data."""

    nats_per_token: float
    standard_error: float | None
    """Standard error of nats_per_token, over the batches; None with one batch. Too small if a shard was read
    more than once."""
    bits_per_byte: float
    """NELBO in bits per UTF-8 byte; comparable across tokenizers and families."""
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)


def estimate_likelihood(
    run_batch: Callable[[int], tuple[float, int]], num_batches: int, bytes_per_token: float
) -> Likelihood:
    """Mean bound over evaluation batches.

    Each batch is stratified over the diffusion time on its own, so batches are independent estimates.

    Args:
        run_batch: function from i to the NELBO of batch i, summed in nats, and its token count; batch i has
            the same data and noise in every call, on any layout, so two models are compared at equal noise.
        num_batches: batches to run.
        bytes_per_token: UTF-8 bytes of the text per token, from the data manifest.

    Returns:
        The estimate.
    """
    results = [run_batch(index) for index in range(num_batches)]
    means = np.array([bound / tokens for bound, tokens in results])
    tokens = sum(tokens for _, tokens in results)
    nats = sum(bound for bound, _ in results) / tokens
    error = float(means.std(ddof=1) / math.sqrt(num_batches)) if num_batches > 1 else None
    return Likelihood(nats, error, nats / math.log(2) / bytes_per_token, tokens)
