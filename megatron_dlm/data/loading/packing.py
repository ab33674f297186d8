"""Blocks of seq_length tokens, packed across documents as the paper does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.interfaces import InputError


class Rows(Protocol):
    """Rows of a shard that a run reads: blocks of text, or prompt-response records."""

    label: str
    """Name of the shard's files."""
    name: str
    """Identity of the rows: checksum of the tokens, the part that is read, and how it is cut into rows."""
    num_rows: int

    def read(self, row_indices: NDArray[np.int64], /) -> NDArray[np.int64]:
        """Tokens, int64 [B, L + 1]."""

    def read_documents(self, row_indices: NDArray[np.int64], /) -> NDArray[np.int64] | None:
        """Document of each token, int64 [B, L + 1]; tokens attend within it. None: no document mask."""

    def read_loss_mask(self, row_indices: NDArray[np.int64], /) -> NDArray[np.bool_] | None:
        """True for tokens that are noised and scored, bool [B, L + 1]; None if all tokens are."""


class TokenBlocks:
    """The shard's token stream cut into blocks at stride L, each read with one token of look-ahead.

    Every family sees the same blocks; AR predicts the look-ahead token from the block's last one. The last
    block needs its look-ahead too, so a shard of N tokens has (N - 1) // L blocks.
    """

    def __init__(
        self,
        shard: Shard,
        seq_length: int,
        *,
        document_mask: bool = False,
        documents: tuple[int, int] | None = None,
    ) -> None:
        """`document_mask`: also give each token's document; `documents`: range to read; None: all."""
        self.seq_length = seq_length
        self.label = shard.prefix.name
        ends = np.cumsum(shard.document_lengths, dtype=np.int64)
        first, last = documents or (0, len(ends))
        self._start, end = (int(ends[index - 1]) if index else 0 for index in (first, last))
        self.num_tokens = end - self._start
        self.num_rows = (self.num_tokens - 1) // seq_length
        self.name = f"{shard.manifest.tokens_sha256}/{first}-{last}/{seq_length}"
        self._shard = shard
        self._document_ends = ends if document_mask else None
        if self.num_rows < 1:
            part = "" if documents is None else f"documents {first} to {last} of "
            raise InputError(
                f"data.seq_length: {seq_length} needs {seq_length + 1} tokens, "
                f"{part}{shard.prefix} has {self.num_tokens}"
            )

    def read(self, row_indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of some blocks.

        Args:
            row_indices: int64 [B], each in [0, num_rows).

        Returns:
            int64 [B, L + 1].

        Raises:
            InputError: an id outside the vocabulary, or the mask id, which clean data never contains.
        """
        length = self.seq_length
        starts = self._start + row_indices * length
        rows = self._shard.tokens.read([(start, start + length + 1) for start in starts.tolist()])
        token_ids = np.stack(rows).astype(np.int64)
        self._shard.check_ids(token_ids)
        return token_ids

    def read_documents(self, row_indices: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Which document of the shard each token of some blocks belongs to.

        Args:
            row_indices: int64 [B], each in [0, num_rows).

        Returns:
            int64 [B, L + 1], or None where blocks are read without document masks.
        """
        if self._document_ends is None:
            return None
        starts = self._start + row_indices * self.seq_length
        tokens = starts[:, None] + np.arange(self.seq_length + 1)
        return np.searchsorted(self._document_ends, tokens, side="right").astype(np.int64)

    def read_loss_mask(self, row_indices: NDArray[np.int64]) -> None:
        """None: all tokens are noised and scored."""
        return None


def split_documents(num_documents: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """Cut documents in order into parts, as Megatron-LM's --split does.

    Args:
        num_documents: number of documents in the shard.
        shares: relative shares of the parts; they need not add up to 1.

    Returns:
        Range of documents [first, end) of each part; no document is in two parts.
    """
    bounds = [round(num_documents * sum(shares[:n]) / sum(shares)) for n in range(len(shares) + 1)]
    return list(pairwise(bounds))
