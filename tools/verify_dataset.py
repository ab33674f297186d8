"""Check indexed shards whole: checksums, index, counts, ids; and show how some documents decode.

    python tools/verify_dataset.py data/train data/held-out [--tokenizer DIRECTORY] [--documents 2]
    python tools/verify_dataset.py megatron_shard --write-manifest --tokenizer DIRECTORY    # index --adopt

PREFIX stands for PREFIX.bin, .idx and .json. Exit code 0 where all is as the manifests say, 2 where not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_dlm.cli.index_adopt import adopt
from megatron_dlm.cli.main import run_and_exit, with_home
from megatron_dlm.data.shards.manifest import shard_path
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.data.shards.token_file import as_path
from megatron_dlm.data.tokenizers.special_tokens import AS_IN_ITS_FILES
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from megatron_dlm.interfaces import InputError


def verify(prefix: str) -> Shard:
    """Open a shard and read all of it.

    Args:
        prefix: of the shard.

    Returns:
        The shard.

    Raises:
        InputError: what is not as the manifest says.
    """
    shard = Shard(prefix)
    shard.verify_checksums()
    vocabulary = shard.manifest.vocabulary
    start = 0
    for first, lengths, tokens in track(
        shard.pieces(), description=str(prefix), disable=not sys.stderr.isatty()
    ):
        if (tokens == vocabulary.mask_token_id).any():
            place = start + int(np.argmax(tokens == vocabulary.mask_token_id))
            raise InputError(f"data: {prefix}: token {place} is the mask id {vocabulary.mask_token_id}")
        shard.check_ids(tokens)
        wrong = np.flatnonzero(tokens[np.cumsum(lengths) - 1] != vocabulary.eos_token_id)
        if shard.manifest.append_eos and len(wrong):
            raise InputError(f"data: {prefix}: document {first + wrong[0]} does not end with <eos>")
        start += len(tokens)
    return shard


def show_documents(shard: Shard, tokenizer: Path, count: int) -> None:
    """Print the beginning of some documents, spread over the shard, as text."""
    manifest = shard.manifest
    loaded = load_tokenizer(tokenizer, known={manifest.tokenizer_fingerprint: manifest.vocabulary})
    if loaded.fingerprint != shard.manifest.tokenizer_fingerprint:
        raise InputError(f"tokenizer: {tokenizer} is not the one that made {shard.prefix}")
    ends = np.cumsum(shard.document_lengths)
    for document in np.linspace(0, len(ends) - 1, count).astype(int):
        start = int(ends[document] - shard.document_lengths[document])
        text = loaded.decode(shard.tokens[start : min(start + 40, int(ends[document]))].tolist())
        print(f"{shard.prefix} document {document}: {text[:160]!r}")


def main() -> int:
    """Parse, verify, print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="shards to verify, or their URLs")
    parser.add_argument("--tokenizer", type=Path, help="decode with it (the manifest's, where it still is)")
    parser.add_argument(
        "--write-manifest", action="store_true", help="check shards of Megatron-LM and write their manifests"
    )
    parser.add_argument("--documents", type=int, default=2, help="documents of each shard to decode (2)")
    arguments = parser.parse_args(with_home(sys.argv[1:]))
    if arguments.write_manifest:
        if arguments.tokenizer is None:
            raise InputError("--write-manifest: needs --tokenizer, the one that made the ids")
        adopt(tuple(map(Path, arguments.prefixes)), arguments.tokenizer, AS_IN_ITS_FILES)
        return 0
    table = Table("shard", "documents", "tokens", "dtype", "ids", "mask id", "verdict")
    failed = False
    for prefix in arguments.prefixes:
        try:
            shard = verify(prefix)
            manifest = shard.manifest
            numbers = (f"{manifest.num_documents:,}", f"{manifest.num_tokens:,}", manifest.dtype)
            ids = (f"{manifest.vocabulary.size:,}", f"{manifest.vocabulary.mask_token_id:,}, absent")
            table.add_row(str(prefix), *numbers, *ids, "as the manifest says")
            tokenizer = arguments.tokenizer or Path(manifest.tokenizer_directory)
            if arguments.tokenizer or tokenizer.exists():
                show_documents(shard, tokenizer, arguments.documents)
        except InputError as error:
            failed = True
            files = [shard_path(as_path(prefix), suffix) for suffix in (".bin", ".idx", ".json")]
            verdict = "DAMAGED" if any(path.exists() for path in files) else "missing"
            table.add_row(str(prefix), *[""] * 5, verdict)
            print(f"verify_dataset: error: {error}", file=sys.stderr)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 2 if failed else 0


if __name__ == "__main__":
    run_and_exit("verify_dataset", main)
