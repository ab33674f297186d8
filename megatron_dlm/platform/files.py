"""Files that are either whole or absent: write beside, flush to disk, rename."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """Refuse an output path that exists already, before any work is done.

    Args:
        output: path of a file or directory to create.

    Raises:
        InputError: the path exists, or its nearest existing parent is not a directory.
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
    """A temporary path to write `output` to before it is renamed into place; deleted at the end.

    Args:
        output: path to create; missing parent directories are created.

    Yields:
        A path with the same file name in a new temporary directory beside `output`, on the same file system.
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


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table with a header; readers see the old file or the new one, never a part.

    Args:
        path: the table, replaced if it exists.
        columns: names of its columns.
        rows: values by column.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    commit(temporary, path)
