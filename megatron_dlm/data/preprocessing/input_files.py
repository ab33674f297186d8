"""Input files of the indexer: names, globs, directories and URLs, and how to open them."""

from __future__ import annotations

import glob
import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from megatron_dlm.interfaces import InputError

STDIN = "-"
ARROW_FILES = ("state.json", "dataset_dict.json")
"""Files by which a folder of `datasets` is known; its .json files hold no text."""
Format = Literal["jsonl", "text", "parquet"]
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".zst")
ZSTANDARD_WINDOW_LOG = 31
"""Largest window of a Zstandard frame, log2 of bytes: that of `zstd --ultra --long=31`. Reading such a frame
takes that much memory."""


@dataclass(frozen=True)
class Source:
    """An input file or object, and how to read it."""

    path: str
    """Local path or URL."""
    format: Format
    compression: str
    """Suffix of the compression, .gz or .zst; empty: not compressed."""
    num_bytes: int
    """Size of the file as stored, compressed or not."""
    modified: int
    """Modification time in nanoseconds since the epoch, 0 for URLs; if it changes, indexing starts over."""

    @property
    def divisible(self) -> bool:
        """Whether reading may begin in the middle of the bytes."""
        return self.format != "parquet" and not self.compression


def find_sources(inputs: Iterable[str | Path]) -> list[Source]:
    """Find the input files, in the order given; files of one glob or directory are sorted by name.

    Args:
        inputs: paths, globs, directories (their files of a known suffix, subdirectories too) and URLs.

    Returns:
        At least one source.

    Raises:
        InputError: a name without files, or a file of another suffix.
    """
    found = []
    for name in map(str, inputs):
        if "\n" in name or "\0" in name:
            raise InputError(f"input: {name!r}: a path with a line break or NUL")
        paths = _expand_url(name) if is_url(name) else _expand(name)
        found += [_describe(path) for path in paths]
    if not found:
        raise InputError("input: no files")
    return found


def is_url(name: str) -> bool:
    """Whether a name is a URL of an object store or another fsspec file system."""
    return "://" in name


def _expand(name: str) -> list[str]:
    if os.path.isdir(name):
        if any(os.path.isfile(os.path.join(name, file)) for file in ARROW_FILES):
            raise InputError(
                f"input: {name}: a folder of datasets' save_to_disk; "
                f"datasets.load_from_disk({name!r}).to_parquet('FILE.parquet') writes what is read here"
            )
        inside = (str(path) for path in sorted(Path(name).rglob("*")) if path.is_file())
        paths = [path for path in inside if _suffixes(path)]
        if not paths:
            raise InputError(f"input: {name}: a directory without {', '.join(SUFFIXES)} files")
        return paths
    if not os.path.exists(name) and glob.has_magic(name):
        paths = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not paths:
            raise InputError(f"input: {name}: no such files")
        return paths
    return [name]


def _expand_url(name: str) -> list[str]:
    system, path = _file_system(name)
    if glob.has_magic(path):
        paths = sorted(system.glob(path))
    elif system.isdir(path):
        paths = sorted(p for p in system.find(path) if _suffixes(p))
    else:
        paths = [path] if system.exists(path) else []
    if not paths:
        raise InputError(f"input: {name}: no such file")
    return [system.unstrip_protocol(path) for path in paths]


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"input: {url}: {error}") from error
    return system, path


def _suffixes(path: str) -> tuple[Format, str] | None:
    stem, compression = path, ""
    for suffix in COMPRESSED:
        if path.endswith(suffix):
            stem, compression = path.removesuffix(suffix), suffix
    known = next((kind for suffix, kind in SUFFIXES.items() if stem.endswith(suffix)), None)
    if known is None or (known == "parquet" and compression):
        return None
    return known, compression


def _describe(path: str) -> Source:
    suffixes = _suffixes(path)
    stem = path.removesuffix(".bin").removesuffix(".idx")
    if suffixes is None and os.path.isfile(f"{stem}.bin") and os.path.isfile(f"{stem}.idx"):
        raise InputError(
            f"input: {path}: tokens already; `megatron-dlm index --adopt {stem} --tokenizer TOKENIZER` takes "
            "Megatron-LM's shards, and training those that have a manifest"
        )
    if suffixes is None:
        raise InputError(
            f"input: {path}: suffix is not one of {', '.join(SUFFIXES)} (text also with .gz, .zst)"
        )
    if is_url(path):
        system, inside = _file_system(path)
        return Source(path, *suffixes, num_bytes=int(system.size(inside)), modified=0)
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"input: {path}: {os.strerror(error.errno or 0).lower()}") from error
    if not os.path.isfile(path):
        raise InputError(f"input: {path}: not a file")
    return Source(path, *suffixes, num_bytes=status.st_size, modified=status.st_mtime_ns)


def open_raw(source: Source) -> IO[bytes]:
    """Open the file as stored, without decompression; the file supports `seek`."""
    if not is_url(source.path):
        return open(source.path, "rb", buffering=1 << 20)
    system, path = _file_system(source.path)
    file: Any = system.open(path, "rb")
    # Files of object stores know no readline(limit).
    opened: IO[bytes] = io.BufferedReader(file, 1 << 20)
    return opened


def open_decompressed(source: Source) -> IO[bytes]:
    """Open the decompressed text from its start; reading may raise if the archive is damaged or truncated.

    Args:
        source: a file of lines.

    Returns:
        A buffered reader.
    """
    raw: Any = open_raw(source)
    if source.compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    if source.compression == ".zst":
        return _open_zstandard(raw)
    opened: IO[bytes] = raw
    return opened


def damage_errors() -> tuple[type[Exception], ...]:
    """What reading an archive raises where it is damaged or cut short, beside OSError without a number."""
    return (EOFError, zlib.error, _zstandard().ZstdError)


def _zstandard() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _open_zstandard(raw: IO[bytes]) -> IO[bytes]:
    zstd = _zstandard()
    longest: dict[int, int] = {zstd.DecompressionParameter.window_log_max: ZSTANDARD_WINDOW_LOG}
    opened: Any = zstd.open(raw, "rb", options=longest)
    return opened
