"""Diffusion times of one global batch: stratified, in a scrambled van der Corput order.

Sample i of n gets t = epsilon + (1 - epsilon) (u_i + pi(i)) / n. Any contiguous slice of the batch, a
micro-batch or a rank's share, is itself spread over [0, 1], so masked counts are balanced; the scramble is
drawn anew for every batch, so over steps every place in the batch sees every stratum.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.interfaces import InputError
from megatron_dlm.objectives.base import CorruptionContext


@lru_cache(maxsize=8)
def van_der_corput_ranks(n: int) -> NDArray[np.int64]:
    """Rank of each i in [0, n) when sorted by its radical inverse in base 2; int64 [n], a permutation."""
    bits = max(1, (n - 1).bit_length())
    reversed_bits = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(n)]
    return np.argsort(np.argsort(reversed_bits)).astype(np.int64)


def scrambled_strata(n: int, scramble: int) -> NDArray[np.int64]:
    """The stratum of each place of a batch.

    Args:
        n: samples of the global batch.
        scramble: drawn uniformly from [0, n) for each batch.

    Returns:
        int64 [n], a permutation of the strata: ranks XOR scramble for n a power of two, else rotated by it.
    """
    ranks = van_der_corput_ranks(n)
    return ranks ^ scramble if n & (n - 1) == 0 else (ranks + scramble) % n


def stratified_times(
    sample_indices: NDArray[np.int64], context: CorruptionContext, *, time_epsilon: float
) -> NDArray[np.float64]:
    """Times of some samples of a global batch, one in each of its equal strata of [time_epsilon, 1].

    Lower variance than independent draws; independent jitter in each stratum as the paper's code has it
    (arXiv:2602.15014), low-discrepancy sampling of Kingma et al. 2021 (arXiv:2107.00630).

    Args:
        sample_indices: int64 [B], positions in the run, all within the batch of `context`.
        context: address of the draws.
        time_epsilon: smallest time, in [0, 1); bounds the NELBO's weight by 1 / time_epsilon.

    Returns:
        float64 [B].

    Raises:
        InputError: time_epsilon outside [0, 1).
    """
    if not 0 <= time_epsilon < 1:
        raise InputError(f"objective.time_epsilon: {time_epsilon} is outside [0, 1)")
    n = context.global_batch_size
    scramble = context.noise.integer("time/scramble", context.batch_start, n)
    strata = scrambled_strata(n, scramble)[sample_indices - context.batch_start]
    jitter = context.noise.uniform("time/jitter", sample_indices, 1)[:, 0]
    return time_epsilon + (1.0 - time_epsilon) * (jitter + strata) / n
