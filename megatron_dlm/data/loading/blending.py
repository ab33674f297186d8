"""Which block of which shard each sample of a run reads: blends by weight, which may change during a run.

Everything is computed from the sample's position, so there is no index to build and no state but the count
of samples. The order of the shards is pseudo-random, since a periodic one would tie shards to whatever else
has a period in the batch; each shard's own blocks come in an addressed permutation an epoch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dlm.data.loading.packing import Rows
from megatron_dlm.interfaces import InputError, TokenBatch
from megatron_dlm.platform.rng import NoiseSource, Permutation

STRETCH = 1024
"""Samples in one stretch; in each, every shard's count matches its weight to within one sample."""


@dataclass(frozen=True)
class Blend:
    """Shards with their weights."""

    names: tuple[str, ...]
    """Name of each shard: checksum of its tokens, the part of it that is read, and the block length."""
    weights: tuple[float, ...]
    """Share of the samples that comes from each shard; the shares add up to 1."""

    @staticmethod
    def of(names: Sequence[str], weights: Sequence[float]) -> Blend:
        """A blend from weights that need not add up to 1.

        Args:
            names: names of the shards.
            weights: weights of the same shards, above 0.

        Returns:
            The blend.

        Raises:
            InputError: one shard twice, or a weight that is not above 0.
        """
        if doubles := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(f"data.train: one shard twice (tokens {doubles[0][:16]})")
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise InputError(f"data.train: weights {' '.join(map(str, weights))} are not all above 0")
        return Blend(tuple(names), tuple(weight / sum(weights) for weight in weights))

    def counts(self, stretches: int) -> NDArray[np.int64]:
        """Samples of each shard in each of the first stretches.

        Args:
            stretches: number of stretches, n.

        Returns:
            int64 [n, shards]; every row adds up to STRETCH, and every sum over rows is the weight's share to
            within a sample or two.
        """
        exact = np.array(self.weights) * STRETCH
        whole = np.floor(exact).astype(np.int64)
        # Systematic sampling of what is left of each row, with offsets that fill [0, 1) evenly.
        ends = np.cumsum(exact - whole)
        ends[-1] = round(ends[-1])
        golden = (math.sqrt(5) - 1) / 2
        offsets = (np.arange(stretches) * golden + golden) % 1.0
        taken = np.floor(np.concatenate([[0.0], ends])[None] + offsets[:, None]).astype(np.int64)
        return whole + np.diff(taken, axis=1)


@dataclass(frozen=True)
class PlanSegment:
    """A blend and the sample of the run from which it applies."""

    first_sample: int
    blend: Blend


class SampleOrder:
    """Sample position in the run -> shard and block, for the last segment of a plan.

    A shard that an earlier segment has read continues after the last sample read there, so no sample is
    repeated or skipped.
    """

    def __init__(self, plan: Sequence[PlanSegment], num_rows: Mapping[str, int], noise: NoiseSource) -> None:
        """`num_rows`: number of rows of each shard of the last segment, by name."""
        self._first, self._blend = plan[-1].first_sample, plan[-1].blend
        self._noise = noise
        self._num_rows = [num_rows[name] for name in self._blend.names]
        read: Counter[str] = Counter()
        for segment, following in pairwise(plan):
            samples = following.first_sample - segment.first_sample
            counts = _Segment(segment.blend, noise, segment.first_sample).read_before(samples)
            read.update(dict(zip(segment.blend.names, counts.tolist(), strict=True)))
        self._before = np.array([read[name] for name in self._blend.names], dtype=np.int64)
        self._segment = _Segment(self._blend, noise, self._first)
        self._permutation = lru_cache(maxsize=2 * len(self._num_rows))(self._new_permutation)

    def _new_permutation(self, shard: int, epoch: int) -> Permutation:
        stream = f"data/order/{self._blend.names[shard]}"
        return Permutation(self._num_rows[shard], self._noise, stream, epoch)

    def __call__(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard and block that each sample reads.

        Args:
            positions: int64 [B], positions of samples in the run, not below the segment's first sample.

        Returns:
            Indices of the shards in the blend, int64 [B], and of the blocks in their shards, int64 [B].
        """
        shards, indices = self._segment.locate(positions - self._first)
        indices = indices + self._before[shards]
        blocks = [
            self._permutation(int(shard), int(index) // self._num_rows[shard])(
                np.array([index % self._num_rows[shard]])
            )[0]
            for shard, index in zip(shards, indices, strict=True)
        ]
        return shards, np.array(blocks, dtype=np.int64)

    def epochs(self, position: int) -> list[float]:
        """How often each shard has been read by all samples before `position`."""
        counts = self._before + self._segment.read_before(position - self._first)
        return [float(c) / blocks for c, blocks in zip(counts, self._num_rows, strict=True)]


class _Segment:
    """The sequence of shards of one blend."""

    def __init__(self, blend: Blend, noise: NoiseSource, first_sample: int) -> None:
        self._blend = blend
        self._noise = noise
        self._first = first_sample
        self._before = np.zeros((1, len(blend.names)), dtype=np.int64)
        self._stretch = lru_cache(maxsize=8)(self._new_stretch)

    def _read_before_stretch(self, stretch: int) -> NDArray[np.int64]:
        if stretch >= len(self._before):
            counts = self._blend.counts(max(stretch, 2 * len(self._before)))
            self._before = np.concatenate([np.zeros_like(self._before[:1]), np.cumsum(counts, axis=0)])
        return self._before[stretch]

    def _new_stretch(self, stretch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard of each sample of a stretch, in order, and the number of earlier samples of that shard."""
        before = self._read_before_stretch(stretch)
        counts = self._read_before_stretch(stretch + 1) - before
        sorted_shards = np.repeat(np.arange(len(counts)), counts)
        shuffle = Permutation(STRETCH, self._noise, f"data/blend/{self._first}", stretch)
        shards = sorted_shards[shuffle(np.arange(STRETCH))]
        indices = np.empty(STRETCH, dtype=np.int64)
        for shard in range(len(counts)):
            own = shards == shard
            indices[own] = before[shard] + np.arange(counts[shard])
        return shards, indices

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard of each sample of the segment, and its index among that shard's samples."""
        found = [
            (shards[place], indices[place])
            for stretch, place in zip(*np.divmod(samples, STRETCH), strict=True)
            for shards, indices in [self._stretch(int(stretch))]
        ]
        shards, indices = np.array(found, dtype=np.int64).reshape(-1, 2).T
        return shards, indices

    def read_before(self, sample: int) -> NDArray[np.int64]:
        """Samples of each shard among the segment's first ones."""
        stretch, place = divmod(sample, STRETCH)
        counts = self._read_before_stretch(stretch).copy()
        if place:
            shards, _ = self._stretch(stretch)
            counts += np.bincount(shards[:place], minlength=len(counts))
        return counts


class SampleReader:
    """Reads the samples of a plan out of its shards."""

    def __init__(self, plan: Sequence[PlanSegment], shards: Mapping[str, Rows], noise: NoiseSource) -> None:
        """`shards`: shards of the last segment, by name."""
        self._shards = [shards[name] for name in plan[-1].blend.names]
        self._order = SampleOrder(plan, {name: blocks.num_rows for name, blocks in shards.items()}, noise)

    def read(self, positions: NDArray[np.int64]) -> TokenBatch:
        """The samples at some positions of the run.

        Args:
            positions: int64 [B], positions of samples in the run.

        Returns:
            Token batch of the samples, in the order of the positions.
        """
        shards, indices = self._order(positions)
        # By shard, so that each is asked once; then in the order of the positions.
        places = [np.flatnonzero(shards == shard) for shard in np.unique(shards)]
        order = np.argsort(np.concatenate(places))
        found = [(self._shards[shards[own[0]]], indices[own]) for own in places]
        tokens = [rows.read(own) for rows, own in found]
        return TokenBatch(
            token_ids=torch.from_numpy(np.concatenate(tokens)[order]),
            sample_indices=positions,
            document_ids=_stacked(
                [rows.read_documents(own) for rows, own in found], map(np.zeros_like, tokens), order
            ),
            loss_mask=_stacked(
                [rows.read_loss_mask(own) for rows, own in found],
                (np.ones_like(some, dtype=np.bool_) for some in tokens),
                order,
            ),
        )

    def epochs(self, position: int) -> dict[str, float]:
        """Epochs of each shard read before a position, by the name of the shard's files."""
        return {
            blocks.label: epochs
            for blocks, epochs in zip(self._shards, self._order.epochs(position), strict=True)
        }


def _stacked(
    parts: Sequence[NDArray[Any] | None], absent: Iterable[NDArray[Any]], order: NDArray[np.int64]
) -> torch.Tensor | None:
    """Rows of all shards, with `absent` where a shard has None; None if all shards have None."""
    if all(part is None for part in parts):
        return None
    filled = [other if part is None else part for part, other in zip(parts, absent, strict=True)]
    return torch.from_numpy(np.concatenate(filled)[order])
