"""Diffusion times of one global batch: stratified, in a scrambled van der Corput order.

Place i of n gets t = epsilon + (1 - epsilon) (u_i + pi(i)) / n. Any contiguous slice of the batch, a
micro-batch or a rank's share, is itself spread over [0, 1], so masked counts are balanced; the scramble is
drawn anew for every batch, so over steps every place in the batch sees every stratum.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.diffusion.context import CorruptionContext

TimeOrder = Literal["scrambled", "reference"]


@lru_cache(maxsize=8)
def van_der_corput_ranks(n: int) -> NDArray[np.int64]:
    """Rank of each i in [0, n) when sorted by its radical inverse in base 2; int64 [n], a permutation."""
    bits = max(1, (n - 1).bit_length())
    places = np.arange(n, dtype=np.int64)
    reversed_bits = sum(((places >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    return np.argsort(np.argsort(reversed_bits)).astype(np.int64)


def scrambled_strata(n: int, scramble: int) -> NDArray[np.int64]:
    """Time stratum of each sample of a global batch.

    Args:
        n: samples in the global batch (times the diffusion times per sample).
        scramble: integer drawn uniformly from [0, n) for each batch.

    Returns:
        int64 [n], a permutation of the strata: ranks XOR scramble for n a power of two, else rotated by it.
    """
    ranks = van_der_corput_ranks(n)
    return ranks ^ scramble if n & (n - 1) == 0 else (ranks + scramble) % n


def batch_strata(
    sample_indices: NDArray[np.int64], context: CorruptionContext, order: TimeOrder, per_sample: int = 1
) -> NDArray[np.int64]:
    """Strata of some samples of a global batch.

    Args:
        sample_indices: int64 [B], positions in the run, all within the batch of `context`.
        context: address of the draws.
        order: "scrambled", or "reference" for the paper's code, which gives strata in increasing order and so
            ties each rank to one band of times.
        per_sample: times that each sample needs.

    Returns:
        int64 [B, per_sample], each of the n * per_sample strata once over the global batch.
    """
    n = context.global_batch_size * per_sample
    places = (sample_indices - context.batch_start)[:, None] * per_sample + np.arange(per_sample)
    if order == "reference":
        return places
    return scrambled_strata(n, context.noise.integer("time/scramble", context.batch_start, n))[places]


def times_in_strata(
    strata: NDArray[np.int64],
    num_strata: int,
    sample_indices: NDArray[np.int64],
    context: CorruptionContext,
    *,
    time_epsilon: float,
) -> NDArray[np.float64]:
    """A time within each given stratum of [time_epsilon, 1].

    Independent jitter in each stratum as the paper's code has it (arXiv:2602.15014); low-discrepancy sampling
    of Kingma et al. 2021 (arXiv:2107.00630).

    Args:
        strata: int64 [B, per_sample], in [0, num_strata).
        num_strata: equal parts of the interval.
        sample_indices: int64 [B], positions in the run.
        context: address of the draws; its `time_range`, if any, replaces [time_epsilon, 1].
        time_epsilon: smallest time, in [0, 1); bounds the NELBO's weight by 1 / time_epsilon.

    Returns:
        float64 [B, per_sample], below 1.
    """
    first, last = context.time_range or (time_epsilon, 1.0)
    jitter = context.noise.uniform("time/jitter", sample_indices, strata.shape[1])
    times: NDArray[np.float64] = first + (last - first) * (jitter + strata) / num_strata
    # The last stratum's end may round to 1, where some schedules have alpha = 0.
    return np.minimum(times, np.nextafter(1.0, 0.0))


def stratified_times(
    sample_indices: NDArray[np.int64],
    context: CorruptionContext,
    *,
    time_epsilon: float,
    order: TimeOrder = "scrambled",
    per_sample: int = 1,
) -> NDArray[np.float64]:
    """Diffusion times of given samples; the global batch has one per stratum of [time_epsilon, 1].

    Args:
        sample_indices: int64 [B], positions in the run, all within the batch of `context`.
        context: address of the draws.
        time_epsilon: smallest time, in [0, 1).
        order: how strata are assigned to samples, "scrambled" or "reference"; see `batch_strata`.
        per_sample: times that each sample needs.

    Returns:
        float64 [B, per_sample].
    """
    strata = batch_strata(sample_indices, context, order, per_sample)
    num_strata = context.global_batch_size * per_sample
    return times_in_strata(strata, num_strata, sample_indices, context, time_epsilon=time_epsilon)
