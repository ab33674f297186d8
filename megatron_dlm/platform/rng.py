"""Addressed randomness: every draw is a pure function of (seed, stream name, sample position).

Nothing is consumed, so draws are equal on every tensor, pipeline and data parallel rank, after any resume
and for any micro-batch size. Philox counters and raw 64-bit words only: numpy keeps those stable over
versions, which it does not promise for `numpy.random.Generator`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NoiseSource:
    """Draws addressed by stream name and position under one seed."""

    seed: int
    purpose: str = "train"
    """Keeps validation draws apart from training draws of the same seed."""

    def words(self, stream: str, position: int, count: int) -> NDArray[np.uint64]:
        """Raw random words.

        Args:
            stream: name of the draw, for example "mdlm/mask"; streams are independent.
            position: sample or step the draw belongs to, >= 0.
            count: number of 64-bit words.

        Returns:
            uint64 [count].
        """
        digest = hashlib.sha256(f"{self.seed}/{self.purpose}/{stream}".encode()).digest()
        key = np.frombuffer(digest[:16], dtype="<u8")
        # The low counter words run over the draws of one position, so positions never overlap.
        counter = np.array([0, 0, position, 0], dtype=np.uint64)
        return np.random.Philox(counter=counter, key=key).random_raw(count)

    def uniform(self, stream: str, positions: Iterable[int], count: int) -> NDArray[np.float64]:
        """Uniform draws in [0, 1), one row a position.

        Args:
            stream: name of the draw.
            positions: P positions, each >= 0.
            count: draws per position.

        Returns:
            float64 [P, count], multiples of 2**-53.
        """
        rows = [self.words(stream, int(position), count) for position in positions]
        return (np.stack(rows) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, stream: str, positions: Iterable[int], count: int, bound: int) -> NDArray[np.int64]:
        """Uniform integers in [0, bound), one row a position; the modulo's bias is below bound / 2**64.

        Args:
            stream: name of the draw.
            positions: P positions, each >= 0.
            count: draws per position.
            bound: number of values.

        Returns:
            int64 [P, count].
        """
        rows = [self.words(stream, int(position), count) for position in positions]
        return (np.stack(rows) % np.uint64(bound)).astype(np.int64)

    def integer(self, stream: str, position: int, bound: int) -> int:
        """One integer in [0, bound); the bias of the modulo is below bound / 2**64."""
        return int(self.words(stream, position, 1)[0]) % bound


class Permutation:
    """A pseudo-random permutation of [0, size) that needs no table.

    A four-round Feistel network on the smallest even-bit domain that holds `size`, with cycle walking for
    indices that fall outside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Any index
    of an epoch of any length costs the same, so a resume needs nothing but the index.
    """

    def __init__(self, size: int, noise: NoiseSource, stream: str, position: int) -> None:
        if size < 1:
            raise ValueError(f"permutation size: {size} is below 1")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = noise.words(stream, position, 4)

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Images of `indices` (int64, each in [0, size)); the same shape."""
        images = self._encrypt(indices.astype(np.uint64))
        outside = images >= self.size
        while outside.any():
            images[outside] = self._encrypt(images[outside])
            outside = images >= self.size
        return images.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The 64-bit finalizer of splitmix64 (Steele et al. 2014): every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
