"""Real text that every machine has: the sources and documentation of the installed Python packages."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".py", ".txt", ".md", ".rst", ".h", ".json", ".pyi")


def write_text(path: Path, num_bytes: int) -> int:
    """JSON lines of real text, each file of the installed packages once, then once more; bytes of text."""
    done = 0
    with path.open("w", encoding="utf-8") as out:
        while done < num_bytes:
            for text in package_texts():
                out.write(json.dumps({"text": text}) + "\n")
                done += len(text.encode())
                if done >= num_bytes:
                    break
    return done


def package_texts() -> Iterator[str]:
    """Text files of the Python installation, in pieces of at most 20,000 characters."""
    for root in sorted(
        {os.path.dirname(os.__file__), *(path for path in sys.path if "site-packages" in path)}
    ):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, ValueError):
                    continue
                yield from (text[start : start + 20_000] for start in range(0, len(text), 20_000))


def texts_of(path: Path, num_bytes: int) -> Iterator[str]:
    """Texts from the start of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"]
            num_bytes -= len(text)
            yield text
            if num_bytes < 0:
                return
