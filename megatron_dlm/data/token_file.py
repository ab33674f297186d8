"""Ranges of a `.bin` file, on a disk or in an object store.

Read, not mapped: a mapped file that somebody cuts ends the process with a bus error, a read one with a line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.sources import is_url
from megatron_dlm.interfaces import InputError


def as_path(name: str | Path) -> Path:
    """A local path, or for a URL such as s3://bucket/prefix what reads there in the same words.

    Args:
        name: path or URL.

    Returns:
        A `pathlib.Path`, or a `upath.UPath`, which does all that is asked of it here.
    """
    if isinstance(name, str) and is_url(name):
        from upath import UPath

        return cast(Path, UPath(name))
    return Path(name)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of storage, of which each kind has its own, as one line.

    Args:
        path: what is read.

    Yields:
        Nothing.

    Raises:
        InputError: it cannot be read.
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
    """The tokens of a file, as an array that is read where it is looked at; usable in forked processes."""

    def __init__(self, path: Path, dtype: np.dtype[np.generic], num_tokens: int) -> None:
        self._path = path
        self._dtype = dtype
        self._num_tokens = num_tokens
        self._remote = is_url(str(path))
        self._opened: Any = None
        self._process = 0

    def __len__(self) -> int:
        return self._num_tokens

    def __getitem__(self, where: slice) -> NDArray[np.integer]:
        """Tokens of a range, as numpy cuts it."""
        start, stop, step = where.indices(self._num_tokens)
        assert step == 1
        tokens = np.empty(max(0, stop - start), dtype=self._dtype)
        with naming(self._path):
            self._read_into(tokens, start * self._dtype.itemsize)
        return cast(NDArray[np.integer], tokens)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All tokens, in memory."""
        return np.asarray(self[:], dtype=dtype)

    def _read_into(self, tokens: NDArray[Any], offset: int) -> None:
        buffer = memoryview(tokens.view(np.uint8))  # type: ignore[arg-type]
        done = 0
        while done < len(buffer):
            count = self._read_some(buffer[done:], offset + done)
            done += count
            # A disk may give less than asked for at a time, a store gives all that it has.
            if done < len(buffer) and (self._remote or not count):
                raise InputError(
                    f"data: {self._path}: ends at byte {offset + done} of "
                    f"{self._num_tokens * self._dtype.itemsize}; was it cut while in use?"
                )

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        if not self._remote:
            if self._opened is None:
                self._opened = self._path.open("rb", buffering=0)
            return os.preadv(self._opened.fileno(), [buffer], offset)
        if self._process != os.getpid():
            # Connections do not survive a fork.
            self._opened, self._process = as_path(str(self._path)), os.getpid()
        piece = self._opened.fs.cat_file(self._opened.path, start=offset, end=offset + len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None, "_process": 0}
