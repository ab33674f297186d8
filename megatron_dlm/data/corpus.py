"""Documents of text files: one JSON object a line, or plain text with blank lines between documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.interfaces import InputError

SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class Document:
    """A document, or the reason why there is none at this place."""

    source: Path
    line_number: int
    """1-based line the document starts at."""
    text: str | None
    reject_reason: str = ""


def read_documents(path: Path, json_key: str) -> Iterator[Document]:
    """Documents and rejects of one file, in file order, in constant memory.

    Args:
        path: a `.jsonl` or `.txt` file in UTF-8.
        json_key: member of each JSON object that holds the text.

    Yields:
        One entry per JSON line, or per block of text lines between blank lines.
    """
    check_readable(path)
    reader = _read_jsonl(path, json_key) if path.suffix == ".jsonl" else _read_text(path)
    yield from reader


def read_texts(path: Path, json_key: str) -> Iterator[str]:
    """Texts of one file's documents.

    Args:
        path: as for `read_documents`.
        json_key: as for `read_documents`.

    Yields:
        The text of each document.

    Raises:
        InputError: a document is unusable.
    """
    for document in read_documents(path, json_key):
        if document.text is None:
            raise InputError(f"input: {path}:{document.line_number}: {document.reject_reason}")
        yield document.text


def check_readable(path: Path) -> None:
    """Refuse a file that cannot be input.

    Args:
        path: a `.jsonl` or `.txt` file.

    Raises:
        InputError: the file is missing or has another suffix.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"input: {path}: suffix {path.suffix!r} is not one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"input: {path}: no such file")


def _read_jsonl(path: Path, json_key: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            text, reason = _text_of(line, json_key)
            yield Document(path, number, text, reason)


def _text_of(line: bytes, json_key: str) -> tuple[str | None, str]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: {error.reason}"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    if not isinstance(record, dict):
        return None, "not a JSON object"
    if json_key not in record:
        return None, f"no key {json_key!r}"
    text = record[json_key]
    if not isinstance(text, str):
        return None, f"key {json_key!r} holds {type(text).__name__}, not a string"
    return _encodable(text)


def _encodable(text: str) -> tuple[str | None, str]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return None, "contains a lone surrogate, which no UTF-8 text can"
    return text, ""


def _read_text(path: Path) -> Iterator[Document]:
    block: list[bytes] = []
    start = 1
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                start = start if block else number
                block.append(line)
            elif block:
                yield _text_document(path, start, block)
                block = []
    if block:
        yield _text_document(path, start, block)


def _text_document(path: Path, start: int, block: list[bytes]) -> Document:
    try:
        return Document(path, start, b"".join(block).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Document(path, start, None, f"not UTF-8: {error.reason}")
