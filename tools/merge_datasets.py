"""Join indexed shards of one tokenizer to one, document after document, in memory that does not grow.

    python tools/merge_datasets.py --input data/a data/b --output data/both
    python tools/merge_datasets.py --input data --output-prefix both      # all shards of a directory

The inputs' checksums are verified first. Exit code 2 where shards do not fit together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.cli.main import run_and_exit, with_home
from megatron_dlm.data.preprocessing.merge_parts import TokenCounts, merge_tokens, publish
from megatron_dlm.data.shards.manifest import FileDigest, shard_path
from megatron_dlm.data.shards.shard import Shard, ShardIndex, read_index, write_index
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.files import sha256_of

SAME = (
    "tokenizer_fingerprint",
    "vocabulary",
    "dtype",
    "append_eos",
    "json_key",
    "prompt_key",
    "chat_template",
    "special_tokens_as_text",
)
"""What all manifests must agree on."""


def find_prefixes(inputs: list[Path]) -> list[Path]:
    """Prefixes of shards, those of directories by name.

    Args:
        inputs: prefixes and directories.

    Returns:
        The prefixes, in order.

    Raises:
        InputError: a directory without shards.
    """
    prefixes: list[Path] = []
    for path in inputs:
        if not path.is_dir():
            prefixes.append(path)
            continue
        found = sorted(index.with_suffix("") for index in path.glob("*.idx"))
        if not found:
            raise InputError(f"input: {path}: a directory without shards (.idx)")
        prefixes += found
    return prefixes


def merge(prefixes: list[Path], output: Path) -> None:
    """Write the joined shard; what was there before stays where something goes wrong.

    Args:
        prefixes: of the shards, in order.
        output: prefix of the joined one.

    Raises:
        InputError: damaged shards, or of different tokenizers or options; an output among the inputs.
    """
    if output.resolve() in [prefix.resolve() for prefix in prefixes]:
        raise InputError(f"output: {output} is one of the inputs")
    manifests = []
    for prefix in prefixes:
        shard = Shard(prefix)
        shard.verify_checksums()
        manifests.append(shard.manifest)
    first = manifests[0]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        for field in SAME:
            mine, theirs = getattr(first, field), getattr(manifest, field)
            if mine != theirs:
                raise InputError(f"input: {prefix}: {field} {theirs} is not the {mine} of {prefixes[0]}")
    dtype = np.dtype(first.dtype).newbyteorder("<")
    final = {suffix: shard_path(output, suffix) for suffix in (".bin", ".idx")}
    temporary = {path: shard_path(output, f"{suffix}.tmp") for suffix, path in final.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        counts = TokenCounts(first.vocabulary.size)
        bins = [shard_path(prefix, ".bin") for prefix in prefixes]
        tokens = merge_tokens(bins, temporary[final[".bin"]], final[".bin"].name, dtype, counts)

        def lengths() -> Iterator[NDArray[np.int32]]:
            for prefix in prefixes:
                yield _index_of(prefix).lengths

        def documents() -> Iterator[NDArray[np.int32]]:
            for prefix in prefixes:
                yield np.diff(_index_of(prefix).boundaries).astype(np.int32)

        target = temporary[final[".idx"]]
        write_index(target, dtype, lengths, documents)
        index = FileDigest(name=final[".idx"].name, bytes=target.stat().st_size, sha256=sha256_of(target))
        manifest = replace(
            first,
            num_documents=sum(manifest.num_documents for manifest in manifests),
            num_tokens=sum(manifest.num_tokens for manifest in manifests),
            num_prompt_tokens=sum(manifest.num_prompt_tokens for manifest in manifests),
            num_text_bytes=sum(manifest.num_text_bytes for manifest in manifests),
            unigram_entropy_nats=counts.entropy(),
            sources=tuple(source for manifest in manifests for source in manifest.sources),
            files=(tokens, index),
            plan_sha256="",
        )
        publish({output: manifest}, temporary)
        print(f"{output}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _index_of(prefix: Path) -> ShardIndex:
    return read_index(shard_path(prefix, ".idx"), shard_path(prefix, ".bin").stat().st_size)


def main() -> int:
    """Parse and merge; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        help="prefixes of shards, in order, or directories, whose shards are taken by name",
    )
    parser.add_argument(
        "--output", "--output-prefix", type=Path, required=True, help="prefix of the joined shard"
    )
    arguments = parser.parse_args(with_home(sys.argv[1:]))
    merge(find_prefixes(arguments.input), arguments.output)
    return 0


if __name__ == "__main__":
    run_and_exit("merge_datasets", main)
