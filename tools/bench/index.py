"""Indexing beside Megatron-LM's way of it, as whole processes: MB/s, peak memory, start-up, reading.

    python tools/bench/index.py [--megabytes 200] [--large-megabytes 2000] [--vocabularies 8192 32768]

The other side does per document what Megatron-LM's tools/preprocess_data.py does: a pool of processes, one
JSON line to each in turn, `tokenizers` to encode it, megatron-core's builder to write it. Both get the same
real text (the sources and documentation of the installed Python packages) and two workers, in turn, and must
write the same bytes. Medians of several rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pool
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_dlm.data.shards.manifest import shard_path
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from megatron_dlm.platform.files import sha256_of
from tools.bench.text import texts_of, write_text

WORKERS = 2


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=200, help="text of the comparison (200)")
    parser.add_argument(
        "--large-megabytes", type=int, default=2000, help="text for the memory, 0: none (2000)"
    )
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768], help="ids")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each side (3)")
    parser.add_argument("--megatron", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.megatron:
        index_as_megatron(*map(Path, arguments.megatron))
        return
    with tempfile.TemporaryDirectory() as directory:
        measure(Path(directory), arguments)


def measure(directory: Path, arguments: argparse.Namespace) -> None:
    """All tables."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    text = directory / "text.jsonl"
    num_bytes = write_text(text, arguments.megabytes * 10**6)
    table = Table("ids", "ours MB/s", "Megatron-LM's way MB/s", "ratio", "ours MiB", "theirs MiB", "bytes")
    for size in arguments.vocabularies:
        tokenizer = directory / f"tokenizer-{size}"
        train_tokenizer(texts_of(text, 20 * 10**6), size, tokenizer)
        ours, theirs = [], []
        for round_ in range(arguments.repeats):
            ours.append(run(index_words(text, tokenizer, directory / "ours")))
            theirs.append(run([__file__, "--megatron", text, tokenizer, directory / "theirs"]))
            equal = digests(directory / "ours") == digests(directory / "theirs")
            console.print(f"{size} ids, round {round_ + 1}: {ours[-1][0]:.1f} s, {theirs[-1][0]:.1f} s")
        speeds = [num_bytes / 1e6 / statistics.median(t for t, _ in side) for side in (ours, theirs)]
        memory = [max(m for _, m in side) for side in (ours, theirs)]
        table.add_row(
            f"{size:,}",
            *(f"{speed:.1f}" for speed in speeds),
            f"{speeds[0] / speeds[1]:.1f}x",
            *(f"{mib:,.0f}" for mib in memory),
            "equal" if equal else "DIFFERENT",
        )
    console.print(f"{num_bytes / 1e6:.0f} MB of text, {WORKERS} workers, medians of {arguments.repeats}")
    console.print(table)
    console.print(other_figures(directory, text, tokenizer, arguments))


def other_figures(directory: Path, text: Path, tokenizer: Path, arguments: argparse.Namespace) -> Table:
    """Start-up, memory of much text, reading."""
    table = Table("what", "figure")
    small = directory / "small.jsonl"
    write_text(small, 10**6)
    seconds = [run(index_words(small, tokenizer, directory / "small"))[0] for _ in range(arguments.repeats)]
    table.add_row("1 MB from start to finish", f"{statistics.median(seconds):.2f} s")
    if arguments.large_megabytes:
        large = directory / "large.jsonl"
        with large.open("wb") as out:
            while out.tell() < arguments.large_megabytes * 10**6:
                with text.open("rb") as file:
                    shutil.copyfileobj(file, out)
        for path in (text, large):
            taken, mib = run(index_words(path, tokenizer, directory / "large"))
            megabytes = path.stat().st_size / 1e6
            table.add_row(
                f"peak memory of {megabytes:,.0f} MB, largest process",
                f"{mib:,.0f} MiB ({megabytes / taken:.0f} MB/s)",
            )
    for workers in (0, 1, WORKERS):
        where = f"{workers} workers" if workers else "the process itself"
        reads = random_reads(directory / "ours", workers)
        table.add_row(f"random reads of 2,048 tokens, {where}", f"{reads:,.0f} tokens/s")
    table.add_row("opening a shard of 10 million documents", f"{open_many(directory / 'many'):.2f} s")
    return table


def index_words(text: Path, tokenizer: Path, output: Path) -> list[Any]:
    """Command line of our side."""
    words = ["-m", "megatron_dlm", "index", "--input", text, "--output", output, "--tokenizer", tokenizer]
    return [*words, "--workers", WORKERS]


def run(words: list[Any]) -> tuple[float, float]:
    """Seconds of a Python process, and the peak memory of its largest process in MiB."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{words} ended with status {status}")
    return time.monotonic() - started, usage.ru_maxrss / 1024


def digests(prefix: Path) -> list[str]:
    """SHA-256 of a shard's files."""
    paths = [shard_path(prefix, suffix) for suffix in (".bin", ".idx")]
    return [sha256_of(path) for path in paths]


class _Encoder:
    """Encodes one document a call, in a process of the pool."""

    tokenizer: Any

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def start(self) -> None:
        """Load the tokenizer, once a process."""
        _Encoder.tokenizer = load_tokenizer(self._directory).tokenizer

    def encode(self, line: str) -> list[int]:
        """Ids of a line's text."""
        ids: list[int] = _Encoder.tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
        return ids


def index_as_megatron(text: Path, tokenizer: Path, output: Path) -> None:
    """Index as Megatron-LM does, in a process of its own."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loaded, encoder = load_tokenizer(tokenizer), _Encoder(tokenizer)
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(loaded.size))
    with text.open(encoding="utf-8") as file, Pool(WORKERS, initializer=encoder.start) as pool:
        for ids in pool.imap(encoder.encode, file, 32):
            document = [*ids, loaded.vocabulary.eos_token_id] if ids else []
            builder.add_document(document, [len(document)] if document else [])
    builder.finalize(f"{output}.idx")


def random_reads(prefix: Path, workers: int) -> float:
    """Tokens a second of samples in random order, pages in memory, by this process or by worker processes."""
    from megatron_dlm.data.loading.blending import Blend, PlanSegment, SampleReader
    from megatron_dlm.data.loading.packing import TokenBlocks
    from megatron_dlm.data.loading.prefetch import Prefetcher
    from megatron_dlm.data.shards.shard import Shard
    from megatron_dlm.platform.rng import NoiseSource

    blocks = TokenBlocks(Shard(prefix), 2048)
    reader = SampleReader(
        [PlanSegment(0, Blend.of([blocks.name], [1.0]))], {blocks.name: blocks}, NoiseSource(0)
    )
    source = Prefetcher(
        lambda first: reader.read(np.arange(first, first + 16)), lambda first: first + 16, workers=workers
    )
    source.get(0)
    started, count = time.monotonic(), 16
    while time.monotonic() - started < 3:
        source.get(count)
        count += 16
    seconds = time.monotonic() - started
    source.close()
    return (count - 16) * 2048 / seconds


def open_many(prefix: Path) -> float:
    """Seconds to open and check the index of 10 million documents of two tokens."""
    from megatron_dlm.data.shards.shard import read_index, write_index

    lengths = np.full(10_000_000, 2, dtype=np.int32)
    write_index(
        shard_path(prefix, ".idx"), np.dtype("<u2"), lambda: iter([lengths]), lambda: iter([lengths // 2])
    )
    started = time.monotonic()
    read_index(shard_path(prefix, ".idx"), 40_000_000)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
