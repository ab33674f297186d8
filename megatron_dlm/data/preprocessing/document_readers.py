"""Reads the documents of one unit in bounded memory: texts by key, and the lines that are rejected."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import orjson

from megatron_dlm.data.preprocessing.chat_template import ChatTemplate
from megatron_dlm.data.preprocessing.input_files import (
    Source,
    damage_errors,
    find_sources,
    open_decompressed,
    open_raw,
)
from megatron_dlm.data.preprocessing.work_units import Unit, open_parquet, plan_units
from megatron_dlm.interfaces import InputError

LARGEST_LINE_BYTES = 64 << 20
"""Default limit for one line of input; longer lines are rejected."""
BATCH_BYTES = 4 << 20
"""Approximate bytes of input in one batch of documents."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SKIPPED_BYTES = 1 << 20

Text = str | list[str]
"""Text of a document: a string, or a list of strings, one for each of its sequences."""


def whole(text: Text) -> str:
    """A document's text in one piece."""
    return text if isinstance(text, str) else "".join(text)


@dataclass
class Batch:
    """Some documents in order."""

    texts: list[list[Text]] = field(default_factory=list)
    """The text under each key, for each document."""
    rejects: list[tuple[int, str]] = field(default_factory=list)
    """Line of the unit, counted from 1, and the reason, for each rejected line."""
    lines: list[int] = field(default_factory=list)
    """Line of the unit at which each document begins."""
    num_lines: int = 0
    num_bytes: int = 0
    """Bytes of input read for the batch, decompressed."""


@dataclass(frozen=True)
class RecordFields:
    """What is read of each record."""

    keys: tuple[str, ...]
    """Members of each JSON object, or columns, in order; plain text has one."""
    chat: ChatTemplate | None = None
    """What turns the only member, a list of messages, into documents; None: members are texts."""

    def documents(self, values: Sequence[object]) -> list[list[Text]]:
        """Turn a record into documents.

        Args:
            values: members of the record under the keys.

        Returns:
            Documents, each a list of texts, one for each key.

        Raises:
            ValueError: a member is of another type, or no conversation.
        """
        if self.chat is not None:
            return [[document] for document in self.chat.documents(*values)]
        for key, value in zip(self.keys, values, strict=True):
            if not _is_text(value):
                raise ValueError(f"key {key!r} holds {type(value).__name__}, not a string")
        return [list(cast(Sequence[Text], values))]


def read_batches(source: Source, unit: Unit, fields: RecordFields, max_line_bytes: int) -> Iterator[Batch]:
    """The documents of a unit.

    Args:
        source: source that the unit belongs to.
        unit: unit to read.
        fields: what is read of each record.
        max_line_bytes: maximum bytes of a line, or of a plain-text document; a longer one is rejected.

    Yields:
        Batches of about BATCH_BYTES.

    Raises:
        InputError: the file or archive cannot be read to its end.
    """
    readers = {"jsonl": _json_lines, "text": _plain_text}
    try:
        if source.format == "parquet":
            yield from _parquet_rows(source, unit, fields)
            return
        with open_raw(source) if source.divisible else open_decompressed(source) as file:
            if source.divisible:
                file.seek(unit.start)
            lines = _lines(file, unit.end - unit.start if source.divisible else None, max_line_bytes)
            yield from readers[source.format](lines, fields, max_line_bytes)
    except damage_errors() as error:
        raise InputError(f"input: {source.path}: cut short or damaged: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"input: {source.path}: damaged: {error}") from error


def _lines(file: IO[bytes], num_bytes: int | None, max_line_bytes: int) -> Iterator[tuple[bytes | None, int]]:
    """Each line with its size in bytes, until `num_bytes` are read; None for a line above the limit."""
    done = 0
    while num_bytes is None or done < num_bytes:
        line = file.readline(max_line_bytes + 1)
        if not line:
            return
        size = len(line)
        if size > max_line_bytes and not line.endswith(b"\n"):
            while rest := file.readline(_SKIPPED_BYTES):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
            line = None  # type: ignore[assignment]
        done += size
        yield line, size


def _json_lines(
    lines: Iterator[tuple[bytes | None, int]], fields: RecordFields, max_line_bytes: int
) -> Iterator[Batch]:
    batch = Batch()
    for number, (line, size) in enumerate(lines, start=1):
        batch.num_lines += 1
        batch.num_bytes += size
        if line is None:
            batch.rejects.append((number, f"a line above --max-line-bytes {max_line_bytes}"))
        elif line.strip():
            try:
                documents = _documents_of(line, fields)
            except ValueError as error:
                batch.rejects.append((number, str(error)))
            else:
                batch.texts += documents
                batch.lines += [number] * len(documents)
        if batch.num_bytes >= BATCH_BYTES:
            yield batch
            batch = Batch()
    yield batch


def _documents_of(line: bytes, fields: RecordFields) -> list[list[Text]]:
    """Documents of a line; a ValueError says why it has none."""
    try:
        record, slow = orjson.loads(line), False
    except orjson.JSONDecodeError:
        # What the slower parser takes all the same (NaN, lone surrogates in other members), or a reason.
        record, slow = _parse_slowly(line), True
    if isinstance(record, list):
        raise ValueError("a JSON array, not an object; `jq -c '.[]'` writes its elements as lines")
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    for key in fields.keys:
        if key not in record:
            raise ValueError(f"no key {key!r}")
    documents = fields.documents([record[key] for key in fields.keys])
    if slow and not all(_encodable(text) for document in documents for text in document):
        raise ValueError("contains a lone surrogate, which no UTF-8 text can")
    return documents


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(part, str) for part in value)
    )


def _encodable(text: Text) -> bool:
    try:
        whole(text).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parse_slowly(line: bytes) -> Any:
    """The JSON value of a line; a ValueError says why there is none."""
    try:
        return json.loads(line.removeprefix(BYTE_ORDER_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        if line.strip() in (b"{", b"["):
            lines = "JSON over several lines; `jq -c .` writes an object as one, `jq -c '.[]'` an array's"
            raise ValueError(lines) from error
        raise ValueError(f"not JSON: {error}") from error


def _plain_text(
    lines: Iterator[tuple[bytes | None, int]], fields: RecordFields, max_line_bytes: int
) -> Iterator[Batch]:
    """Documents between blank lines; each is its lines as they are."""
    if fields.chat is not None:
        raise InputError("chat_key: plain text has no messages; give JSON lines or Parquet")
    batch, block_bytes, start, reason = Batch(), 0, 1, ""
    block: list[bytes] = []

    def finish() -> None:
        nonlocal block, block_bytes, reason
        if reason:
            batch.rejects.append((start, reason))
        elif block:
            text = b"".join(block).removeprefix(BYTE_ORDER_MARK)
            try:
                batch.texts.append([text.decode("utf-8")])
                batch.lines.append(start)
            except UnicodeDecodeError as error:
                batch.rejects.append((start, f"not UTF-8: {error.reason}"))
        block, block_bytes, reason = [], 0, ""

    number = 0
    for number, (line, size) in enumerate(lines, start=1):
        batch.num_lines += 1
        batch.num_bytes += size
        if line is None or line.strip():
            if not block and not reason:
                start = number
            block_bytes += size
            if line is None or block_bytes > max_line_bytes:
                reason, block = f"a document above --max-line-bytes {max_line_bytes}", []
            elif not reason:
                block.append(line)
        else:
            finish()
            if batch.num_bytes >= BATCH_BYTES:
                yield batch
                batch = Batch()
    finish()
    yield batch


def _parquet_rows(source: Source, unit: Unit, fields: RecordFields) -> Iterator[Batch]:
    with open_parquet(source) as file:
        for key in fields.keys:
            if key not in file.schema_arrow.names:
                raise InputError(f"input: {source.path}: no column {key!r}")
        number = 0
        groups = list(range(unit.start, unit.end))
        for rows in file.iter_batches(batch_size=512, row_groups=groups, columns=list(fields.keys)):
            batch = Batch(num_lines=rows.num_rows, num_bytes=rows.nbytes)
            for values in zip(*(rows.column(key).to_pylist() for key in fields.keys), strict=True):
                number += 1
                try:
                    documents = fields.documents(values)
                except ValueError as error:
                    batch.rejects.append((number, str(error)))
                else:
                    batch.texts += documents
                    batch.lines += [number] * len(documents)
            yield batch


def read_texts(inputs: Iterable[str | Path], key: str) -> Iterator[str]:
    """Texts of all documents of some inputs, in order.

    Args:
        inputs: as for `find_sources`.
        key: member of each JSON line, or column, that holds the text.

    Yields:
        The text of each document.

    Raises:
        InputError: a document is unusable.
    """
    sources = find_sources(inputs)
    for unit in plan_units(sources):
        source = sources[unit.source]
        for batch in read_batches(source, unit, RecordFields((key,)), LARGEST_LINE_BYTES):
            if batch.rejects:
                line, reason = batch.rejects[0]
                raise InputError(f"input: {source.path}:{lines_before(source, unit) + line}: {reason}")
            yield from (whole(document[0]) for document in batch.texts)


def lines_before(source: Source, unit: Unit) -> int:
    """Lines, or rows, of a source before a unit; reads all of them, to name a place in an error.

    Args:
        source: source that the unit belongs to.
        unit: unit of the source.

    Returns:
        Number of lines, or rows.
    """
    if source.format == "parquet":
        with open_parquet(source) as file:
            return sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
    with open_raw(source) as file:
        lines, left = 0, unit.start
        while left:
            piece = file.read(min(left, _SKIPPED_BYTES))
            lines, left = lines + piece.count(b"\n"), left - len(piece)
        return lines
