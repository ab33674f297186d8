"""Adopting a shard of megatron-core's builder beside reading its file: GB/s of processes, and the ratio.

    python tools/bench/adopt.py [--gigabytes 10] [--repeats 3] [--directory DIRECTORY]

The other sides are `sha256sum`, whose work adoption does beside its checks, and `cat`, which only reads. All
read the same file in turn; from the second round on it lies in the page cache where memory allows.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from megatron_dlm.data.shards.manifest import shard_path
from megatron_dlm.data.tokenizers.tokenizer import train_tokenizer
from tools.tiny import sentences

VOCABULARY = 320
DOCUMENT_TOKENS = 20_000


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the .bin file (10)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--directory", type=Path, help="where the shard is written (a temporary directory)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        measure(Path(directory), arguments.gigabytes, arguments.repeats)


def measure(directory: Path, gigabytes: float, repeats: int) -> None:
    """Write the shard and time all sides."""
    tokenizer, prefix = directory / "tokenizer", directory / "shard"
    train_tokenizer(sentences(2000, seed=1), VOCABULARY, tokenizer)
    write_shard(prefix, int(gigabytes * 1e9))
    bin_path = shard_path(prefix, ".bin")
    sides: dict[str, list[Any]] = {
        "index --adopt": [
            *(sys.executable, "-m", "megatron_dlm", "index", "--adopt", prefix, "--tokenizer", tokenizer)
        ],
        "sha256sum": ["sha256sum", bin_path],
        "cat": ["cat", bin_path],
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, words in sides.items():
            shard_path(prefix, ".json").unlink(missing_ok=True)
            started = time.monotonic()
            subprocess.run([*map(str, words)], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.monotonic() - started)
    rates = {
        name: bin_path.stat().st_size / 1e9 / statistics.median(times) for name, times in seconds.items()
    }
    table = Table("side", "GB/s", "adopt / side")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.2f}", f"{rates['index --adopt'] / rate:.2f}x")
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(f"{bin_path.stat().st_size / 1e9:.1f} GB of uint16, medians of {repeats} rounds")
    console.print(table)


def write_shard(prefix: Path, num_bytes: int) -> None:
    """Random ids with ends of documents, by megatron-core's builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(1)
    builder = IndexedDatasetBuilder(str(shard_path(prefix, ".bin")), dtype=np.uint16)
    document = generator.integers(3, VOCABULARY, DOCUMENT_TOKENS)
    # <eos> is the first id.
    document[-1] = 0
    ids = torch.from_numpy(document)
    for _ in range(max(1, num_bytes // (2 * DOCUMENT_TOKENS))):
        builder.add_document(ids, [DOCUMENT_TOKENS])
    builder.finalize(str(shard_path(prefix, ".idx")))


if __name__ == "__main__":
    main()
