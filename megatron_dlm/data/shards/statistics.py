"""Statistics of indexed shards: document lengths, tokens per source, and duplicate documents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.shards.shard import Shard


@dataclass(frozen=True)
class ShardStatistics:
    """Document lengths, sources and copies in one shard."""

    shard: Shard
    quantiles: dict[str, int]
    """Document lengths in tokens, by name: shortest, median, 95%, longest."""
    repeats: int
    """Documents with the same tokens as an earlier one of the shard."""
    elsewhere: int
    """Documents with the same tokens as one of another shard that was given."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [documents]."""
        return self.shard.document_lengths

    def histogram(self) -> list[tuple[int, int, int]]:
        """Bins [low, high) between powers of two, in tokens: low, high, number of documents in the bin."""
        edges = 2 ** np.arange(int(self.lengths.max()).bit_length() + 1)
        counts, _ = np.histogram(self.lengths, bins=edges)
        first = int(np.argmax(counts > 0))
        return [
            (int(low), int(high), int(count))
            for low, high, count in zip(edges[first:], edges[first + 1 :], counts[first:], strict=False)
        ]


def statistics_of(shards: Sequence[Shard]) -> list[ShardStatistics]:
    """Statistics of shards, and of documents they have in common.

    Documents are compared by 64 bits of a hash of their tokens: among a billion different ones two are taken
    for the same with a probability of 3%. Needs up to 80 bytes of memory a document.

    Args:
        shards: shards made with one tokenizer; otherwise equal ids do not mean equal text.

    Returns:
        Statistics of each shard, in the order of `shards`.
    """
    hashes = [_document_hashes(shard) for shard in shards]
    distinct = [np.unique(some) for some in hashes]
    found = []
    for index, (shard, own) in enumerate(zip(shards, hashes, strict=True)):
        others = [some for place, some in enumerate(distinct) if place != index]
        elsewhere = int(np.isin(own, np.concatenate(others)).sum()) if others else 0
        lengths = shard.document_lengths
        quantiles = {
            "shortest": int(lengths.min()),
            "median": int(np.median(lengths)),
            "95%": int(np.quantile(lengths, 0.95)),
            "longest": int(lengths.max()),
        }
        found.append(ShardStatistics(shard, quantiles, len(own) - len(distinct[index]), elsewhere))
    return found


def _document_hashes(shard: Shard) -> NDArray[np.uint64]:
    hashes = np.empty(len(shard.document_lengths), dtype=np.uint64)
    for first, lengths, tokens in shard.pieces():
        for document, own in enumerate(np.split(tokens, np.cumsum(lengths)[:-1]), start=first):
            digest = hashlib.blake2b(own.tobytes(), digest_size=8).digest()
            hashes[document] = int.from_bytes(digest, "little")
    return hashes
