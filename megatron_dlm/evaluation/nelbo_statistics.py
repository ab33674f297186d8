"""The NELBO of sequences from noisy copies of each, with intervals, and its dependence on the time.

A sequence's copies have one time in each of K equal strata; the strata's grid is drawn R times. Draws within
a grid are not independent, so errors are taken over whole grids and whole sequences.
Shape legend: N sequences, R replicates of the grid, K copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.evaluation.intervals import Mean, half_width, interval
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.interfaces import InputError


@dataclass(frozen=True, kw_only=True)
class BoundConfig:
    """Number of held-out sequences and of noisy copies that estimate the NELBO."""

    num_sequences: int | None = None
    """Sequences of the model's length, drawn without repeats; None: 128, or all if there are fewer."""
    num_times: int = 16
    """Noisy copies per sequence and replicate, one in each of as many equal strata of the diffusion time. For
    families without noise, such as AR: sequences scored together."""
    replicates: int = 2
    """Independent sets of `num_times` copies per sequence; their spread gives the Monte Carlo error."""
    seed: int = 0
    """Random seed of sequences, times and noise; compare models at the same seed."""

    def __post_init__(self) -> None:
        for name in ("num_sequences", "num_times", "replicates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value} is below 1")


@dataclass(frozen=True, kw_only=True)
class TimeBand:
    """NELBO contribution of one stratum of the diffusion time."""

    first: float
    """Smallest diffusion time of the stratum."""
    last: float
    """Largest diffusion time of the stratum."""
    nats_per_token: float
    """The NELBO's integrand averaged over this stratum; the mean over all strata is the NELBO."""
    standard_error: float | None
    """Standard error over sequences, in nats/token; None with one sequence."""
    half_width: float | None
    """Half the width of the 95% interval; None with one sequence."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """NELBO (exact NLL for AR) of sequences."""

    protocol: Mean
    """NELBO as papers report it (arXiv:2602.15014): times from time_epsilon to 1, no factor for the shorter
    interval, without prior and reconstruction terms; the whole NLL for AR."""
    complete: Mean
    """NELBO with all terms that the protocol leaves out: an upper bound on the negative log-likelihood."""
    monte_carlo_error: float | None
    """Standard error of the protocol NELBO due to the noise alone, in nats/token; None with one replicate."""
    bits_per_byte: float
    """The protocol bound in bits per UTF-8 byte; comparable across tokenizers and families."""
    perplexity: float
    """exp of the protocol bound."""
    sequences: int
    tokens: int
    """Number of scored tokens, each sequence counted once."""
    copies: int
    """Noisy copies of each sequence, R K."""
    by_time: tuple[TimeBand, ...]
    """NELBO by stratum of the diffusion time; empty if a copy has no single time."""


def check_copies(objective: ObjectiveConfig, num_times: int, length: int) -> None:
    """Refuse a number of noisy copies or a length that the family cannot divide.

    Args:
        objective: configuration of the family.
        num_times: noisy copies of a sequence per replicate.
        length: tokens of a sequence.

    Raises:
        InputError: the family cannot divide the copies or the length.
    """
    try:
        objective.check_sizes(num_times, length)
    except InputError as error:
        raise InputError(f"num_times: {num_times} copies: {error}") from error


def ratio(bounds_N: NDArray[np.float64], tokens_N: NDArray[np.int64]) -> Mean:
    """Nats per token over sequences, with the ratio estimator's error clustered by sequence.

    Args:
        bounds_N: float64 [N], nats of each sequence.
        tokens_N: int64 [N], scored tokens of each sequence.

    Returns:
        The mean with its interval.
    """
    count, total = len(bounds_N), tokens_N.sum()
    error = _clustered_error(bounds_N, tokens_N) if count > 1 else None
    return interval(float(bounds_N.sum() / total), error, count)


def _clustered_error(bounds_N: NDArray[np.float64], tokens_N: NDArray[np.int64]) -> float:
    count, total = len(bounds_N), tokens_N.sum()
    residual_N = bounds_N - bounds_N.sum() / total * tokens_N
    return float(math.sqrt(count / (count - 1) * (residual_N**2).sum()) / total)


def summarise(
    bounds_NRK: NDArray[np.float64],
    tokens_N: NDArray[np.int64],
    *,
    early_N: NDArray[np.float64] | None,
    strata_NRK: NDArray[np.int64] | None,
    time_epsilon: float,
    prior_nats: float,
    bytes_per_token: float,
) -> Bound:
    """Summarise the NELBO estimates of noisy copies as means, intervals and values by time.

    Args:
        bounds_NRK: float64 nats of each copy, each an estimate of its sequence's protocol NELBO.
        tokens_N: int64, scored tokens of each sequence.
        early_N: float64 nats, mean of each sequence's integrand below time_epsilon; None if exact (AR).
        strata_NRK: int64, stratum of each copy's time; None if a copy has no single time.
        time_epsilon: smallest diffusion time of the protocol.
        prior_nats: prior term of the NELBO, in nats per token.
        bytes_per_token: UTF-8 bytes of text per token.

    Returns:
        The estimate.
    """
    num_sequences, replicates, copies = bounds_NRK.shape
    per_replicate_NR = bounds_NRK.mean(axis=2)
    bounds_N = per_replicate_NR.mean(axis=1)
    protocol = ratio(bounds_N, tokens_N)
    complete = protocol
    if early_N is not None:
        whole_N = (1.0 - time_epsilon) * bounds_N + time_epsilon * early_N + prior_nats * tokens_N
        complete = ratio(whole_N, tokens_N)
    monte_carlo_error = None
    if replicates > 1 and early_N is not None:
        # Sequences have draws of their own, so their variances add up.
        variance = (per_replicate_NR.var(axis=1, ddof=1) / replicates).sum()
        monte_carlo_error = float(math.sqrt(variance) / tokens_N.sum())
    by_time: tuple[TimeBand, ...] = ()
    if strata_NRK is not None:
        by_time = _by_time(bounds_NRK, tokens_N, strata_NRK, time_epsilon)
    return Bound(
        protocol=protocol,
        complete=complete,
        monte_carlo_error=monte_carlo_error,
        bits_per_byte=protocol.nats_per_token / math.log(2) / bytes_per_token,
        perplexity=math.exp(protocol.nats_per_token),
        sequences=num_sequences,
        tokens=int(tokens_N.sum()),
        copies=replicates * copies,
        by_time=by_time,
    )


def _by_time(
    bounds_NRK: NDArray[np.float64],
    tokens_N: NDArray[np.int64],
    strata_NRK: NDArray[np.int64],
    time_epsilon: float,
) -> tuple[TimeBand, ...]:
    copies = bounds_NRK.shape[2]
    # Each grid has each stratum once.
    ordered_NRK = np.take_along_axis(bounds_NRK, np.argsort(strata_NRK, axis=2), axis=2).mean(axis=1)
    edges = time_epsilon + (1.0 - time_epsilon) * np.arange(copies + 1) / copies
    bands = []
    for index in range(copies):
        own_N = ordered_NRK[:, index]
        error = _clustered_error(own_N, tokens_N) if len(own_N) > 1 else None
        mean = float(own_N.sum() / tokens_N.sum())
        bands.append(
            TimeBand(
                first=float(edges[index]),
                last=float(edges[index + 1]),
                nats_per_token=mean,
                standard_error=error,
                half_width=None if error is None else half_width(error, len(own_N)),
            )
        )
    return tuple(bands)
