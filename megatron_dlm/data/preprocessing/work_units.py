"""Divides the indexer's input into units for its processes: ranges of whole documents, or whole files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import IO

from megatron_dlm.data.preprocessing.input_files import Source, open_raw
from megatron_dlm.interfaces import InputError

SMALLEST_UNIT_BYTES, USUAL_UNIT_BYTES = 4 << 20, 64 << 20
SHARED_UNITS, MOST_UNITS = 256, 4096
"""Small corpora are cut fine enough for all workers, very large ones into units that grow with them."""
_STRIDE = 1 << 20


@dataclass(frozen=True)
class Unit:
    """A part of one source."""

    source: int
    """Index of the source."""
    start: int
    """First byte of the unit in the stored file; for a Parquet file, the first row group."""
    end: int
    """Byte, or row group, after the last one of the unit."""


def plan_units(sources: list[Source], unit_bytes: int | None = None) -> list[Unit]:
    """Divide all sources into units, in order; every process computes the same units.

    Args:
        sources: sources to divide into units.
        unit_bytes: approximate size of a unit in bytes; None: chosen from the total size of the sources.

    Returns:
        Units in the order of the documents.
    """
    if unit_bytes is None:
        total = sum(source.num_bytes for source in sources)
        unit_bytes = max(
            SMALLEST_UNIT_BYTES, min(USUAL_UNIT_BYTES, total // SHARED_UNITS), total // MOST_UNITS
        )
    units = []
    for index, source in enumerate(sources):
        cuts = [*_cuts(source, unit_bytes)]
        units += [Unit(index, start, end) for start, end in pairwise(cuts)]
    return units


def _cuts(source: Source, unit_bytes: int) -> Iterator[int]:
    """First byte of each unit, and the end of the last one."""
    if source.format == "parquet":
        yield from _row_group_cuts(source, unit_bytes)
        return
    yield 0
    if source.divisible:
        with open_raw(source) as file:
            place = unit_bytes
            while place < source.num_bytes:
                place = _document_start(file, place, blank_lines=source.format == "text")
                if place >= source.num_bytes:
                    break
                yield place
                place += unit_bytes
    yield source.num_bytes


def _document_start(file: IO[bytes], place: int, *, blank_lines: bool) -> int:
    """Start of the first document at or after byte `place`: a line, in plain text one after a blank."""
    file.seek(place - 1)
    _skip_line(file)
    if not blank_lines:
        return file.tell()
    seen_blank = False
    while True:
        start = file.tell()
        line = file.readline(_STRIDE)
        if not line:
            return start
        if line.strip():
            if seen_blank:
                return start
            if not line.endswith(b"\n"):
                _skip_line(file)
        else:
            seen_blank = True


def _skip_line(file: IO[bytes]) -> None:
    while line := file.readline(_STRIDE):
        if line.endswith(b"\n"):
            return


def _row_group_cuts(source: Source, unit_bytes: int) -> Iterator[int]:
    with open_parquet(source) as file:
        yield 0
        seen = 0
        for group in range(file.metadata.num_row_groups - 1):
            seen += file.metadata.row_group(group).total_byte_size
            if seen >= unit_bytes:
                yield group + 1
                seen = 0
        yield file.metadata.num_row_groups


def open_parquet(source: Source):  # type: ignore[no-untyped-def]
    """A `pyarrow.parquet.ParquetFile`, which closes as a context.

    Args:
        source: a parquet file.

    Returns:
        The opened file.

    Raises:
        InputError: not a parquet file, or pyarrow is missing.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError("input: .parquet files need the package pyarrow (extra `data`)") from error
    try:
        return parquet.ParquetFile(open_raw(source))
    except ArrowException as error:
        raise InputError(f"input: {source.path}: not a readable parquet file: {error}") from error
