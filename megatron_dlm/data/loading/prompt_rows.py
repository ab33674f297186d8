"""Rows of prompts with their responses, for fine-tuning: whole records, padded, only responses scored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.interfaces import InputError


class PromptRows:
    """Rows of L tokens, each packed with as many whole prompt-response records as fit, then padding.

    Records keep the shard's order, rows do not. Every record is a document of its own, and so is the padding,
    so a record is trained on as if it were alone in its row.
    """

    def __init__(
        self,
        shard: Shard,
        seq_length: int,
        *,
        drop_long: bool = False,
        documents: tuple[int, int] | None = None,
    ) -> None:
        """`drop_long`: skip records above `seq_length` tokens; `documents`: range to read; None: all."""
        assert shard.turn_lengths is not None
        self.seq_length = seq_length
        self.label = shard.prefix.name
        first, last = documents or (0, len(shard.document_lengths))
        ends = np.cumsum(shard.document_lengths, dtype=np.int64)
        lengths = shard.document_lengths
        kept = first + np.flatnonzero(lengths[first:last] <= seq_length)
        if len(kept) < last - first and not drop_long:
            raise InputError(
                f"data.seq_length: {seq_length} is below the {lengths[first:last].max()} tokens of the "
                f"longest record of {shard.prefix}; data.drop_long_records leaves out the "
                f"{last - first - len(kept)} above it"
            )
        if not len(kept):
            raise InputError(f"data.seq_length: {seq_length} is below all records of {shard.prefix}")
        self._shard = shard
        self._starts = (ends - lengths)[kept]
        self._lengths = lengths[kept]
        firsts = shard.boundaries[:-1][np.diff(shard.boundaries) > 0]
        self._turn_lengths = shard.turn_lengths
        self._turns = np.append(firsts, len(shard.turn_lengths))[[kept, kept + 1]]
        self.num_tokens = int(self._lengths.sum())
        self._rows = _packed(self._lengths, seq_length)
        self.num_rows = len(self._rows) - 1
        self.name = f"{shard.manifest.tokens_sha256}/{first}-{last}/{seq_length}/{len(kept)} records"

    def read(self, row_indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of some rows.

        Args:
            row_indices: int64 [B], each in [0, num_rows).

        Returns:
            int64 [B, L + 1], <eos> behind the records.

        Raises:
            InputError: an id outside the vocabulary, or the mask id.
        """
        padding = self._shard.manifest.vocabulary.eos_token_id
        tokens = np.full((len(row_indices), self.seq_length + 1), padding, dtype=np.int64)
        records = self._records(row_indices)
        firsts = [int(self._starts[record]) for _, _, record, _, _ in records]
        lengths = [end - start for *_, start, end in records]
        found = self._shard.tokens.read([(f, f + n) for f, n in zip(firsts, lengths, strict=True)])
        for (row, _, _, start, end), own in zip(records, found, strict=True):
            tokens[row, start:end] = own
        self._shard.check_ids(tokens)
        return tokens

    def read_documents(self, row_indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which record of its row each token of some rows belongs to; padding comes last.

        Args:
            row_indices: int64 [B], each in [0, num_rows).

        Returns:
            int64 [B, L + 1].
        """
        documents = np.full((len(row_indices), self.seq_length + 1), self.seq_length, dtype=np.int64)
        for row, place, _, start, end in self._records(row_indices):
            documents[row, start:end] = place
        return documents

    def read_loss_mask(self, row_indices: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which tokens of some rows belong to a response or an assistant turn, including its <eos>.

        Args:
            row_indices: int64 [B], each in [0, num_rows).

        Returns:
            bool [B, L + 1].
        """
        mask = np.zeros((len(row_indices), self.seq_length + 1), dtype=np.bool_)
        for row, _, record, start, end in self._records(row_indices):
            lengths = self._turn_lengths[slice(*self._turns[:, record])]
            mask[row, start:end] = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        return mask

    def last_turns(self, count: int) -> list[tuple[list[int], list[int]]]:
        """The first records, cut before their last response or assistant turn.

        Args:
            count: maximum number of records.

        Returns:
            Token ids of what comes before that turn, and of the turn, for each record.
        """
        records = range(min(count, len(self._lengths)))
        starts = self._starts[: len(records)]
        found = self._shard.tokens.read(
            [(int(start), int(start + self._lengths[r])) for start, r in zip(starts, records, strict=True)]
        )
        lasts = [int(self._turn_lengths[self._turns[1, record] - 1]) for record in records]
        return [(ids[:-n].tolist(), ids[-n:].tolist()) for ids, n in zip(found, lasts, strict=True)]

    def _records(self, row_indices: NDArray[np.int64]) -> list[tuple[int, int, int, int, int]]:
        """Row, place in the row, index, first token and end of each record that lies in some rows."""
        found = []
        for row, index in enumerate(row_indices.tolist()):
            end = 0
            for place, record in enumerate(range(self._rows[index], self._rows[index + 1])):
                start, end = end, end + int(self._lengths[record])
                found.append((row, place, record, start, end))
        return found


def _packed(lengths: NDArray[np.int64], seq_length: int) -> list[int]:
    """First record of each row, then the number of records; each row takes as many records as fit."""
    ends = np.cumsum(lengths, dtype=np.int64)
    rows = [0]
    while rows[-1] < len(lengths):
        before = int(ends[rows[-1] - 1]) if rows[-1] else 0
        rows.append(int(np.searchsorted(ends, before + seq_length, side="right")))
    return rows
