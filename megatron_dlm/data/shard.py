"""Megatron `.bin`/`.idx` shards: a streaming writer and a reader that checks before it trusts.

The bytes are those of megatron-core's IndexedDatasetBuilder (a test compares them and opens them with
IndexedDataset). Ours because that builder wraps ids silently into uint16 and its reader follows any pointer.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.manifest import Manifest, read_manifest, shard_path
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.files import sha256_of

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
DTYPES: dict[int, np.dtype[np.generic]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER = struct.Struct("<9sQBQQ")
MAX_DOCUMENT_TOKENS = 2**31 - 1


def token_dtype(vocabulary_size: int) -> np.dtype[np.generic]:
    """uint16 below 65,500 ids, else int32; megatron-core's rule."""
    return np.dtype("<u2") if vocabulary_size < 65500 else np.dtype("<i4")


class ShardWriter:
    """Writes documents to `BIN` and, at the end, `IDX`; both paths are the caller's temporary names."""

    def __init__(self, bin_path: Path, idx_path: Path, dtype: np.dtype[np.generic]) -> None:
        self._bin = bin_path.open("wb")
        self._idx_path = idx_path
        self._dtype = dtype
        self._lengths: list[int] = []

    def add_document(self, token_ids: NDArray[np.uint32]) -> None:
        """Append one document.

        Args:
            token_ids: non-empty, each id representable in the shard's dtype.

        Raises:
            InputError: too many tokens for the index's int32 lengths, or an id too large for the dtype.
        """
        if len(token_ids) > MAX_DOCUMENT_TOKENS:
            raise InputError(
                f"document {len(self._lengths)}: {len(token_ids)} tokens exceed {MAX_DOCUMENT_TOKENS}"
            )
        if token_ids.max() > np.iinfo(self._dtype).max:  # type: ignore[type-var]
            raise InputError(
                f"document {len(self._lengths)}: token id {token_ids.max()} does not fit {self._dtype}"
            )
        self._bin.write(token_ids.astype(self._dtype).tobytes())
        self._lengths.append(len(token_ids))

    def close(self) -> None:
        """Write the index and close both files."""
        self._bin.close()
        lengths = np.asarray(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        pointers = np.concatenate([np.zeros(1, np.int64), ends])[: len(lengths)]
        with self._idx_path.open("wb") as file:
            code = CODES[self._dtype]
            file.write(HEADER.pack(INDEX_MAGIC, INDEX_VERSION, code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write(pointers.astype("<i8").tobytes())
            file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._bin.close()


class Shard:
    """A checked, memory-mapped shard.

    Opening compares index, manifest and file sizes; `verify_checksums` also reads the tokens.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
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
        dtype, self.document_lengths = read_index(idx_path, bin_path.stat().st_size)
        if len(self.document_lengths) == 0:
            raise InputError(f"data: {prefix}: no documents")
        counts = (self.manifest.dtype, self.manifest.num_documents, self.manifest.num_tokens)
        found = (dtype.name, len(self.document_lengths), int(self.document_lengths.sum(dtype=np.int64)))
        if counts != found:
            raise InputError(
                f"data: {prefix}: the manifest says {counts} (dtype, documents, tokens), not {found}"
            )
        self.tokens: NDArray[np.integer] = np.memmap(bin_path, dtype=dtype, mode="r")

    def verify_checksums(self) -> None:
        """Read the files whole and compare their SHA-256 with the manifest.

        Raises:
            InputError: a file differs.
        """
        for digest in self.manifest.files:
            path = self.prefix.parent / digest.name
            if sha256_of(path) != digest.sha256:
                raise InputError(f"data: {path}: SHA-256 differs from the manifest")


def read_index(path: Path, bin_bytes: int) -> tuple[np.dtype[np.generic], NDArray[np.int32]]:
    """Read a `.idx` whose documents fill `.bin` end to end, in order.

    Args:
        path: the `.idx` file.
        bin_bytes: size of the `.bin` file; nothing may point outside it.

    Returns:
        dtype of a token, and int32 [documents] lengths in tokens.

    Raises:
        InputError: wrong magic, version, dtype or size; a length, pointer or document out of place.
    """
    size = path.stat().st_size
    if size < HEADER.size:
        raise InputError(f"data: {path}: {size} bytes are fewer than an index header's {HEADER.size}")
    with path.open("rb") as file:
        magic, version, code, sequences, documents = HEADER.unpack(file.read(HEADER.size))
        if magic != INDEX_MAGIC or version != INDEX_VERSION or code not in DTYPES:
            raise InputError(f"data: {path}: not a Megatron index (magic, version or dtype)")
        # Compared before anything is allocated: the counts come from the file.
        if size != HEADER.size + 12 * sequences + 8 * documents:
            raise InputError(
                f"data: {path}: {size} bytes do not hold {sequences} sequences, {documents} documents"
            )
        lengths = np.frombuffer(file.read(4 * sequences), dtype="<i4")
        pointers = np.frombuffer(file.read(8 * sequences), dtype="<i8")
        boundaries = np.frombuffer(file.read(8 * documents), dtype="<i8")
    dtype = DTYPES[code]
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if (lengths <= 0).any() or not np.array_equal(pointers, ends - lengths.astype(np.int64) * dtype.itemsize):
        raise InputError(f"data: {path}: lengths and pointers are not those of documents laid end to end")
    if sequences and ends[-1] != bin_bytes:
        raise InputError(f"data: {path}: points at {ends[-1]} bytes of a .bin that has {bin_bytes}")
    if not np.array_equal(boundaries, np.arange(sequences + 1)):
        raise InputError(f"data: {path}: document boundaries are not one per sequence")
    return dtype, lengths
