"""Megatron `.bin`/`.idx` shards: a streaming writer and a reader that checks before it trusts.

The bytes are those of megatron-core's IndexedDatasetBuilder (a test compares them and opens them with
IndexedDataset). We do not use megatron-core's because its builder silently wraps ids into uint16 and its
reader follows any pointer.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.shards.manifest import Manifest, read_manifest, shard_path
from megatron_dlm.data.shards.token_file import TokenFile, as_path, naming
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.files import sha256_of

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
DTYPES: dict[int, np.dtype[np.generic]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER = struct.Struct("<9sQBQQ")
_PIECE_TOKENS = 1 << 22


def token_dtype(vocabulary_size: int) -> np.dtype[np.generic]:
    """uint16 below 65,500 ids, else int32; megatron-core's rule."""
    return np.dtype("<u2") if vocabulary_size < 65500 else np.dtype("<i4")


def write_index(
    path: Path,
    dtype: np.dtype[np.generic],
    lengths: Callable[[], Iterator[NDArray[np.int32]]],
    documents: Callable[[], Iterator[NDArray[np.int32]]],
) -> None:
    """Write a `.idx` file; memory use does not grow with its size.

    Args:
        path: `.idx` file to write.
        dtype: dtype of a token.
        lengths: returns an iterator over the sequences' lengths in tokens, in pieces; called three times.
        documents: returns an iterator over the documents' numbers of sequences, in pieces; called twice.
    """
    num_sequences = sum(len(piece) for piece in lengths())
    num_documents = sum(len(piece) for piece in documents())
    with path.open("wb") as file:
        file.write(HEADER.pack(INDEX_MAGIC, INDEX_VERSION, CODES[dtype], num_sequences, num_documents + 1))
        for piece in lengths():
            file.write(piece.astype("<i4").data)
        end = 0
        for piece in lengths():
            ends = end + np.cumsum(piece, dtype=np.int64) * dtype.itemsize
            file.write((ends - piece.astype(np.int64) * dtype.itemsize).astype("<i8").data)
            end = int(ends[-1]) if len(ends) else end
        file.write(np.zeros(1, dtype="<i8").data)
        end = 0
        for piece in documents():
            boundaries = end + np.cumsum(piece, dtype=np.int64)
            file.write(boundaries.astype("<i8").data)
            end = int(boundaries[-1]) if len(boundaries) else end


class Shard:
    """A checked shard, local or in an object store.

    Opening compares index, manifest and file sizes; `verify_checksums` also reads the tokens.
    """

    def __init__(self, location: Path | str) -> None:
        """`location`: path or URL of the shard without suffix."""
        self.prefix = prefix = as_path(location)
        with naming(prefix):
            self._open(prefix)

    def _open(self, prefix: Path) -> None:
        self.manifest: Manifest = read_manifest(prefix)
        bin_path, idx_path = shard_path(prefix, ".bin"), shard_path(prefix, ".idx")
        listed = {digest.name for digest in self.manifest.files}
        if listed != {bin_path.name, idx_path.name}:
            raise InputError(f"data: {prefix}: the manifest lists {sorted(listed)}, not its .bin and .idx")
        for digest in self.manifest.files:
            path = prefix.parent / digest.name
            if not path.is_file():
                raise InputError(f"data: {path}: no such file")
            if path.stat().st_size != digest.bytes:
                raise InputError(
                    f"data: {path}: {path.stat().st_size} bytes, the manifest says {digest.bytes}"
                )
        index = read_index(idx_path, bin_path.stat().st_size)
        dtype, lengths, self.boundaries = index.dtype, index.lengths, index.boundaries
        self.document_lengths: NDArray[np.int64] = index.document_lengths()
        self.turn_lengths: NDArray[np.int32] | None = None
        """Tokens of each sequence, given and scored in turn, int32 [sequences]; None where documents have no
        prompts. `boundaries` says which are a document's."""
        if self.manifest.has_prompts:
            sequences = np.diff(self.boundaries)
            if (sequences % 2).any() or (self.manifest.prompt_key and (sequences != 2).any()):
                raise InputError(f"data: {prefix}: a document is not a prompt and a response")
            self.turn_lengths = lengths
        if len(self.document_lengths) == 0:
            raise InputError(f"data: {prefix}: no documents")
        counts = (self.manifest.dtype, self.manifest.num_documents, self.manifest.num_tokens)
        found = (dtype.name, len(self.document_lengths), int(self.document_lengths.sum(dtype=np.int64)))
        if counts != found:
            raise InputError(
                f"data: {prefix}: the manifest says {counts} (dtype, documents, tokens), not {found}"
            )
        # Unlike that of the tokens always: no boundary of a document may move unseen.
        if index.sha256 != self._sha256(idx_path):
            raise InputError(f"data: {idx_path}: SHA-256 differs from the manifest")
        self.tokens = TokenFile(bin_path, dtype, found[2])

    def pieces(self) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.integer]]]:
        """All documents, some megabytes at a time: index of the first one, their lengths, their tokens."""
        ends = np.cumsum(self.document_lengths, dtype=np.int64)
        first, start = 0, 0
        while first < len(ends):
            # At least one, however long.
            last = max(first + 1, int(np.searchsorted(ends, start + _PIECE_TOKENS, side="right")))
            yield first, self.document_lengths[first:last], self.tokens[start : int(ends[last - 1])]
            first, start = last, int(ends[last - 1])

    def check_ids(self, token_ids: NDArray[np.integer]) -> None:
        """Refuse invalid token ids, which tensor parallel embeddings and losses would silently accept.

        Args:
            token_ids: tokens read from the shard.

        Raises:
            InputError: an id outside the vocabulary, or the mask id, which clean data never contains.
        """
        vocabulary = self.manifest.vocabulary
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= vocabulary.size:
            bad = low if low < 0 else high
            raise InputError(f"data: {self.prefix}: token id {bad} is outside [0, {vocabulary.size})")
        if (token_ids == vocabulary.mask_token_id).any():
            raise InputError(f"data: {self.prefix}: contains the mask id {vocabulary.mask_token_id}")

    def verify_checksums(self) -> None:
        """Read the files whole and compare their SHA-256 with the manifest.

        Raises:
            InputError: a file differs.
        """
        for digest in self.manifest.files:
            path = self.prefix.parent / digest.name
            with naming(path):
                if sha256_of(path) != digest.sha256:
                    raise InputError(f"data: {path}: SHA-256 differs from the manifest")

    def _sha256(self, path: Path) -> str:
        """Checksum of a file according to the manifest."""
        return next(digest.sha256 for digest in self.manifest.files if digest.name == path.name)


@dataclass(frozen=True)
class ShardIndex:
    """Content of a `.idx` file."""

    dtype: np.dtype[np.generic]
    """Type in which a token is stored."""
    lengths: NDArray[np.int32]
    """Tokens of each sequence, int32 [sequences]."""
    boundaries: NDArray[np.int64]
    """Sequence at which each document begins, and the end, int64 [documents + 1]; documents may be empty."""
    sha256: str

    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64; those without tokens keep a place in the index only."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])
        tokens = np.diff(ends[self.boundaries])
        return tokens[tokens > 0]


def read_index(path: Path, bin_bytes: int) -> ShardIndex:
    """Read a `.idx` whose sequences fill `.bin` end to end, in order.

    Args:
        path: the `.idx` file.
        bin_bytes: size of the `.bin` file; nothing may point outside it.

    Returns:
        Content of the index, and its checksum.

    Raises:
        InputError: wrong magic, version, dtype or size; a length, pointer or document out of place.
    """
    size = path.stat().st_size
    if size < HEADER.size:
        raise InputError(f"data: {path}: {size} bytes are fewer than an index header's {HEADER.size}")
    with path.open("rb") as file:
        header = file.read(HEADER.size)
        magic, version, code, sequences, documents = HEADER.unpack(header)
        if magic != INDEX_MAGIC:
            raise InputError(f"data: {path}: not a Megatron-LM index: begins with {magic!r}")
        if version != INDEX_VERSION:
            turned = int.from_bytes(version.to_bytes(8, "little"), "big") == INDEX_VERSION
            why = "written on a big-endian machine" if turned else f"version {version} is not {INDEX_VERSION}"
            raise InputError(f"data: {path}: Megatron-LM index, {why}")
        if code not in DTYPES:
            known = ", ".join(f"{known} ({dtype.name})" for known, dtype in DTYPES.items())
            raise InputError(f"data: {path}: type {code} of tokens is none of {known}")
        # Compared before anything is allocated: the counts come from the file.
        if documents < 1 or size != HEADER.size + 12 * sequences + 8 * documents:
            raise InputError(
                f"data: {path}: {size} bytes do not hold {sequences} sequences, {documents} documents"
            )
        arrays = [file.read(4 * sequences), file.read(8 * sequences), file.read(8 * documents)]
    # Of the bytes that are looked at: a store sends them once.
    digest = hashlib.sha256(header)
    for array in arrays:
        digest.update(array)
    lengths, pointers, boundaries = (
        np.frombuffer(array, dtype=kind) for array, kind in zip(arrays, ("<i4", "<i8", "<i8"), strict=True)
    )
    dtype = DTYPES[code]
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if (lengths <= 0).any() or not np.array_equal(pointers, ends - lengths.astype(np.int64) * dtype.itemsize):
        raise InputError(f"data: {path}: lengths and pointers are not those of sequences laid end to end")
    if sequences and ends[-1] != bin_bytes:
        raise InputError(f"data: {path}: points at {ends[-1]} bytes of a .bin that has {bin_bytes}")
    if boundaries[0] != 0 or boundaries[-1] != sequences or (np.diff(boundaries) < 0).any():
        raise InputError(f"data: {path}: document boundaries do not rise from 0 to {sequences} sequences")
    return ShardIndex(dtype, lengths, boundaries, digest.hexdigest())
