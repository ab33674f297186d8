"""The study's text: sources and documentation of Python packages, each document once, held-out ones apart.

python examples/small-scale-study/corpus.py WHEELS OUTPUT

Reads the wheels in WHEELS (`pip download`) and writes train.jsonl and held-out.jsonl. A document is a file;
of equal ones the first stays. The hash of its text decides whether it is held out, so no text is in both.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
LEAST_CHARACTERS, MOST_CHARACTERS = 200, 200_000
HELD_OUT = 64
"""One document in this many is held out."""


def main() -> None:
    """Read, divide, write, count."""
    if len(sys.argv) != 3:
        sys.exit((__doc__ or "").strip())
    wheels, output = map(Path, sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    counts = {"train": [0, 0], "held-out": [0, 0]}
    with (
        (output / "train.jsonl").open("w", encoding="utf-8") as train,
        (output / "held-out.jsonl").open("w", encoding="utf-8") as held_out,
    ):
        for text in documents(wheels):
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            name, file = ("held-out", held_out) if digest[0] % HELD_OUT == 0 else ("train", train)
            file.write(json.dumps({"text": text}) + "\n")
            counts[name][0] += 1
            counts[name][1] += len(text.encode())
    for name, (number, size) in counts.items():
        print(f"{output / name}.jsonl: {number:,} documents, {size:,} bytes of text")


def documents(wheels: Path) -> Iterator[str]:
    """Texts of all wheels, in the order of their names."""
    files = sorted(wheels.glob("*.whl"))
    if not files:
        sys.exit(f"corpus.py: error: {wheels}: no wheels")
    for path in files:
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(SUFFIXES):
                    text = wheel.read(name).decode("utf-8", errors="replace")
                    if LEAST_CHARACTERS <= len(text) <= MOST_CHARACTERS and "\ufffd" not in text:
                        yield text


if __name__ == "__main__":
    main()
