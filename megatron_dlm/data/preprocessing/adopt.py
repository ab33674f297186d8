"""Shards that Megatron-LM has written: checked whole, and given a manifest; nothing is tokenized again."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.preprocessing.merge_parts import TokenCounts, count_ids
from megatron_dlm.data.shards.manifest import FileDigest, Manifest, SourceCount, shard_path, write_manifest
from megatron_dlm.data.shards.shard import ShardIndex, read_index
from megatron_dlm.data.shards.token_file import naming
from megatron_dlm.data.tokenizers.encoders import LoadedTokenizer
from megatron_dlm.data.tokenizers.token_bytes import bytes_of_tokens
from megatron_dlm.interfaces import InputError

logger = logging.getLogger(__name__)
PIECE_BYTES = 16 << 20
SHOWN_CHARACTERS = 160
BACKEND = "adopted"
"""What the manifest has in place of the encoder, which is not known."""
REPLACEMENT = "\ufffd"
COMPARED_DOCUMENTS = 64
"""Documents on which counted bytes of text are compared with decoded ones."""


@dataclass(frozen=True)
class AdoptedShard:
    """Result of an adoption."""

    manifest: Manifest
    unended: int
    """Number of documents that do not end with <eos>."""
    first_unended: int
    """Number of the first of them, counted from 0."""
    samples: tuple[str, ...]
    """How some documents begin, decoded."""


def adopt_shard(
    prefix: Path, loaded: LoadedTokenizer, on_progress: Callable[[int, int], None]
) -> AdoptedShard:
    """Check PREFIX.bin and PREFIX.idx and write PREFIX.json.

    Args:
        prefix: path of the shard without suffix, on a local file system.
        loaded: the tokenizer that made its ids.
        on_progress: called with the bytes read so far and in all.

    Returns:
        The manifest, and what is to be said of the shard.

    Raises:
        InputError: a file is missing, damaged or being written, the shard has a manifest already, or ids that
            the tokenizer does not have, or its mask id.
    """
    bin_path, idx_path = shard_path(prefix, ".bin"), shard_path(prefix, ".idx")
    if shard_path(prefix, ".json").exists():
        raise InputError(
            f"adopt: {shard_path(prefix, '.json')} exists already; tools/verify_dataset.py reads it"
        )
    with naming(prefix):
        before = [os.stat(path) for path in (bin_path, idx_path)]
        index = read_index(idx_path, before[0].st_size)
        documents = _Documents(index, bin_path)
        scan = _Scan(loaded, index.dtype, prefix)
        with ThreadPoolExecutor(1) as beside:
            digest = hashlib.sha256()
            for start, piece in documents.pieces():
                # hashlib gives way to other threads.
                hashed = beside.submit(digest.update, piece.data)
                scan.add(start, piece)
                hashed.result()
                on_progress((start + len(piece)) * index.dtype.itemsize, before[0].st_size)
        unended = documents.without_end(loaded.vocabulary.eos_token_id)
        num_text_bytes = _text_bytes(loaded, documents, scan.counts)
        after = [os.stat(path) for path in (bin_path, idx_path)]
    if [(stat.st_size, stat.st_mtime_ns) for stat in before] != [(s.st_size, s.st_mtime_ns) for s in after]:
        raise InputError(f"adopt: {prefix}: changed while it was read")
    num_documents, num_tokens = len(documents.lengths), int(documents.lengths.sum())
    manifest = Manifest(
        vocabulary=loaded.vocabulary,
        tokenizer_fingerprint=loaded.fingerprint,
        tokenizer_directory=str(loaded.path.resolve()),
        backend=BACKEND,
        dtype=index.dtype.name,
        append_eos=len(unended) == 0,
        # Megatron-LM makes special tokens of text that spells them.
        special_tokens_as_text=False,
        num_documents=num_documents,
        num_tokens=num_tokens,
        num_text_bytes=num_text_bytes,
        unigram_entropy_nats=scan.counts.entropy(),
        sources=(SourceCount(path=str(bin_path), documents=num_documents, tokens=num_tokens, rejects=0),),
        files=(
            FileDigest(name=bin_path.name, bytes=before[0].st_size, sha256=digest.hexdigest()),
            FileDigest(name=idx_path.name, bytes=before[1].st_size, sha256=index.sha256),
        ),
    )
    write_manifest(prefix, manifest)
    return AdoptedShard(
        manifest, len(unended), int(unended[0]) if len(unended) else 0, documents.samples(loaded)
    )


class _Documents:
    """Documents with tokens, read from the `.bin` file."""

    def __init__(self, index: ShardIndex, path: Path) -> None:
        self.lengths = index.document_lengths()
        if not len(self.lengths):
            raise InputError(f"adopt: {path}: no documents")
        self._ends = np.cumsum(self.lengths)
        # The page cache is read in place; the sizes have been compared.
        self._tokens: NDArray[np.integer] = np.memmap(path, dtype=index.dtype, mode="r")

    def pieces(self) -> Iterator[tuple[int, NDArray[np.integer]]]:
        """All tokens, some megabytes at a time, with the position of the first one."""
        step = PIECE_BYTES // self._tokens.dtype.itemsize
        for start in range(0, len(self._tokens), step):
            yield start, self._tokens[start : start + step]

    def document(self, number: int) -> list[int]:
        """Ids of one document."""
        start = int(self._ends[number] - self.lengths[number])
        ids: list[int] = self._tokens[start : int(self._ends[number])].tolist()
        return ids

    def without_end(self, eos_token_id: int) -> NDArray[np.int64]:
        """Numbers of the documents whose last token is not <eos>."""
        return np.flatnonzero(self._tokens[self._ends - 1] != eos_token_id)

    def spread(self, count: int) -> list[int]:
        """Numbers of some documents, spread over the shard."""
        return sorted(set(np.linspace(0, len(self.lengths) - 1, count).astype(int).tolist()))

    def samples(self, loaded: LoadedTokenizer) -> tuple[str, ...]:
        """How the first and a middle document begin."""
        return tuple(
            loaded.decode(self.document(number)[:SHOWN_CHARACTERS])[:SHOWN_CHARACTERS]
            for number in self.spread(3)[:2]
        )


class _Scan:
    """Ids as they are read: refused where the tokenizer does not have them, and counted."""

    def __init__(self, loaded: LoadedTokenizer, dtype: np.dtype[np.generic], prefix: Path) -> None:
        self.counts = TokenCounts(loaded.vocabulary.size)
        self._vocabulary = loaded.vocabulary
        self._tokenizer = loaded.path
        self._prefix = prefix

    def add(self, start: int, ids: NDArray[np.integer]) -> None:
        """Count the ids that begin at position `start`, or name the first that is not the tokenizer's."""
        # uint16 is counted without looking first: at most 65,536 kinds.
        is_bounded = ids.dtype == np.uint16 or (ids.min() >= 0 and ids.max() < self._vocabulary.size)
        occurrences = count_ids(ids, self._vocabulary.size) if is_bounded else None
        if occurrences is None:
            place = int(np.flatnonzero((ids < 0) | (ids >= self._vocabulary.size))[0])
            raise InputError(
                f"adopt: {self._prefix}: token {start + place:,} has id {ids[place]}, outside "
                f"[0, {self._vocabulary.size}) of {self._tokenizer}; was another tokenizer used?"
            )
        mask = self._vocabulary.mask_token_id
        if occurrences[mask]:
            place = int(np.flatnonzero(ids == mask)[0])
            raise InputError(
                f"adopt: {self._prefix}: token {start + place:,} is the mask id {mask}, which clean data "
                "does not hold; --mask-token none gives the model a mask id of its own"
            )
        self.counts.add_counts(occurrences)


def _text_bytes(loaded: LoadedTokenizer, documents: _Documents, counts: TokenCounts) -> int:
    """UTF-8 bytes of the decoded text: by counting where a sample shows that counting is exact."""
    table = bytes_of_tokens(loaded)

    def is_exact(number: int) -> bool:
        assert table is not None
        ids = np.array(documents.document(number))
        text = _decoded(loaded, ids)
        # What stands for bytes that are no text has a length of its own.
        return REPLACEMENT in text or int(table[ids].sum()) == len(text.encode())

    if table is not None and all(is_exact(number) for number in documents.spread(COMPARED_DOCUMENTS)):
        return counts.total(table)
    logger.info(f"{loaded.path}: bytes of text depend on the tokens around; decoding all documents")
    numbers = range(len(documents.lengths))
    return sum(len(_decoded(loaded, np.array(documents.document(n))).encode()) for n in numbers)


def _decoded(loaded: LoadedTokenizer, ids: NDArray[np.integer]) -> str:
    special = (
        loaded.vocabulary.eos_token_id,
        loaded.vocabulary.bos_token_id,
        loaded.vocabulary.mask_token_id,
    )
    return loaded.decode(ids[~np.isin(ids, special)].tolist())
