"""Files with a JSON value a line, read as they come from people and from runs that were killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dlm.interfaces import InputError


def read_json_lines(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    """Values of the lines that are not blank.

    Args:
        path: of the file.
        field: argument that it was given as, for messages.

    Yields:
        Where the line is ("field: path:number"), and its value.

    Raises:
        InputError: unreadable, or a line that is not JSON in UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{field}: {path}: {error.strerror}") from error
    # Not splitlines(), which also cuts at characters that JSON allows within a string.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{field}: {path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from error
        yield where, value


def drop_cut_line(path: Path) -> None:
    """Cut off what is behind the last end of a line: a write that was killed.

    Args:
        path: a file to which lines are appended.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
