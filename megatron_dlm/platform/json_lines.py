"""Files with a JSON value a line, read as they come from people and from runs that were killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dlm.interfaces import InputError


def read_json_lines(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    """Read the values of all lines that are not blank.

    Args:
        path: path of the file.
        field: name of the setting that gave the path, for error messages.

    Yields:
        Location of the line ("field: path:number"), and its value.

    Raises:
        InputError: the file is unreadable, or a line is not JSON in UTF-8.
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
    """Truncate a file after its last complete line, dropping the rest of an interrupted write.

    Args:
        path: a file to which lines are appended.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
