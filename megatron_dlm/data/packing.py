"""Blocks of seq_length tokens, packed across documents as the paper does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.shard import Shard
from megatron_dlm.interfaces import InputError


class TokenBlocks:
    """The shard's token stream cut into blocks at stride L, each read with one token of look-ahead.

    Every family sees the same blocks; AR predicts the look-ahead token from the block's last one. The last
    block needs its look-ahead too, so a shard of N tokens has (N - 1) // L blocks.
    """

    def __init__(self, shard: Shard, seq_length: int, *, document_mask: bool = False) -> None:
        """`document_mask` also tells which document each token belongs to."""
        self.seq_length = seq_length
        self._document_ends = np.cumsum(shard.document_lengths, dtype=np.int64) if document_mask else None
        self.num_blocks = (len(shard.tokens) - 1) // seq_length
        self._shard = shard
        if self.num_blocks < 1:
            raise InputError(
                f"data.seq_length: {seq_length} needs {seq_length + 1} tokens, "
                f"{shard.prefix} has {len(shard.tokens)}"
            )

    def read(self, block_indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of some blocks.

        Args:
            block_indices: int64 [B], each in [0, num_blocks).

        Returns:
            int64 [B, L + 1].

        Raises:
            InputError: an id outside the vocabulary, or the mask id, which clean data never contains.
        """
        length = self.seq_length
        rows = [self._shard.tokens[start : start + length + 1] for start in block_indices * length]
        token_ids = np.stack(rows).astype(np.int64)
        self._check(token_ids)
        return token_ids

    def read_documents(self, block_indices: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Which document of the shard each token of some blocks belongs to.

        Args:
            block_indices: int64 [B], each in [0, num_blocks).

        Returns:
            int64 [B, L + 1], or None where blocks are read without document masks.
        """
        if self._document_ends is None:
            return None
        tokens = block_indices[:, None] * self.seq_length + np.arange(self.seq_length + 1)
        return np.searchsorted(self._document_ends, tokens, side="right").astype(np.int64)

    def _check(self, token_ids: NDArray[np.int64]) -> None:
        # Tensor parallel embeddings and losses accept an id of no rank in silence.
        vocabulary = self._shard.manifest.vocabulary
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= vocabulary.size:
            bad = low if low < 0 else high
            raise InputError(f"data: {self._shard.prefix}: token id {bad} is outside [0, {vocabulary.size})")
        if (token_ids == vocabulary.mask_token_id).any():
            raise InputError(f"data: {self._shard.prefix}: contains the mask id {vocabulary.mask_token_id}")
