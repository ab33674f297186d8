"""Reads ranges of tokens from a `.bin` file, on a disk or in an object store.

The file is read, not memory-mapped: if it is truncated while in use, reading gives an error message, while a
mapped file would kill the process with a bus error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.preprocessing.input_files import is_url
from megatron_dlm.interfaces import InputError


def as_path(name: str | Path) -> Path:
    """A `Path` for a local path, or an object with the same methods for a URL such as s3://bucket/prefix.

    Args:
        name: path or URL.

    Returns:
        A `pathlib.Path`, or a `upath.UPath` for a URL.
    """
    if isinstance(name, str) and is_url(name):
        from upath import UPath

        return cast(Path, UPath(name))
    return Path(name)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn errors of any storage backend into an InputError that names the path.

    Args:
        path: path or URL that is read.

    Yields:
        Nothing.

    Raises:
        InputError: the path cannot be read.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"data: {path}: no such file") from error
    except Exception as error:
        if isinstance(error, OSError) or is_url(str(path)):
            raise InputError(f"data: {path}: cannot be read: {error}") from error
        raise


class TokenFile:
    """The tokens of a file as an array; slices are read on access. Usable in forked processes."""

    def __init__(self, path: Path, dtype: np.dtype[np.generic], num_tokens: int) -> None:
        self._path = path
        self._dtype = dtype
        self._num_tokens = num_tokens
        self._remote = is_url(str(path))
        self._process = os.getpid()
        # The file that was checked, whatever takes its name later; shared with forked processes.
        self._opened: Any = path if self._remote else path.open("rb", buffering=0)

    def __len__(self) -> int:
        return self._num_tokens

    def __getitem__(self, where: slice) -> NDArray[np.integer]:
        """Tokens of a slice, with numpy's slicing rules; the step must be 1."""
        start, stop, step = where.indices(self._num_tokens)
        assert step == 1
        return self.read([(start, max(start, stop))])[0]

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[NDArray[np.integer]]:
        """Tokens of some ranges; all ranges of an object store are fetched in one call.

        Args:
            ranges: ranges of tokens, [start, stop).

        Returns:
            One array for each range.

        Raises:
            InputError: the file has become shorter, or cannot be read.
        """
        size = self._dtype.itemsize
        with naming(self._path):
            in_bytes = [(start * size, stop * size) for start, stop in ranges]
            pieces = self._fetch(in_bytes) if self._remote else [self._read(*some) for some in in_bytes]
        for (start, stop), piece in zip(ranges, pieces, strict=True):
            if len(piece) < (stop - start) * size:
                raise InputError(
                    f"data: {self._path}: ends at byte {start * size + len(piece)} of "
                    f"{self._num_tokens * size}; was it cut while in use?"
                )
        return [cast(NDArray[np.integer], np.frombuffer(piece, dtype=self._dtype)) for piece in pieces]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All tokens, in memory."""
        return np.asarray(self[:], dtype=dtype)

    def _read(self, start: int, stop: int) -> bytes | bytearray:
        """Bytes [start, stop) of the file; fewer if the file ends earlier."""
        piece, done = bytearray(stop - start), 0
        while done < len(piece):
            # A disk may give less than asked for at a time.
            count = os.preadv(self._opened.fileno(), [memoryview(piece)[done:]], start + done)
            if not count:
                break
            done += count
        return piece[:done]

    def _fetch(self, ranges: Sequence[tuple[int, int]]) -> list[bytes | bytearray]:
        """Bytes of some ranges of the object; empty ranges are not requested from the store."""
        if self._process != os.getpid():
            # Connections do not survive a fork.
            self._opened, self._process = as_path(str(self._path)), os.getpid()
        wanted = [(start, stop) for start, stop in ranges if stop > start]
        starts, stops = [start for start, _ in wanted], [stop for _, stop in wanted]
        paths = [self._opened.path] * len(wanted)
        found = iter(self._opened.fs.cat_ranges(paths, starts, stops, on_error="raise"))
        return [bytes(next(found)) if stop > start else b"" for start, stop in ranges]
