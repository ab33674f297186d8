"""Files that are either whole or absent: write beside, flush to disk, rename."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dlm.interfaces import InputError


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    """Flush a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(temporary: Path, final: Path) -> None:
    """Make `temporary` (a file, or a directory whose files are already flushed) appear as `final`."""
    flush_to_disk(temporary)
    temporary.replace(final)
    flush_to_disk(final.parent)


def check_new(output: Path) -> None:
    """Refuse, before the work, to make what is there already.

    Args:
        output: of a file or directory to make.

    Raises:
        InputError: it exists, or what would be its parent is no directory.
    """
    if output.exists() or output.is_symlink():
        raise InputError(f"output: {output} exists already")
    for parent in output.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise InputError(f"output: {parent} is not a directory")
            break


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A place to make `output`, which appears there by a rename; removed at the end with all in it.

    Args:
        output: to make; its parents are made.

    Yields:
        A path of its name in a new directory on its file system, so that nobody's files are in the way.
    """
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=parent) as directory:
        yield Path(directory) / output.name


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; readers see the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    commit(temporary, path)
