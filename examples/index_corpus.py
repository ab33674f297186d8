"""Index a downloaded corpus into the shards that the shipped recipes read.

    python examples/index_corpus.py slim-pajama DIRECTORY --tokenizer TOKENIZER
    python examples/index_corpus.py nemotron-phase1 DIRECTORY --tokenizer TOKENIZER [--held-out-files 1]

DIRECTORY holds .parquet or .jsonl files, also .jsonl.zst and .jsonl.gz, at any depth. With subdirectories
train and validation, these become data/CORPUS/train and data/CORPUS/validation; without, the last files by
name are held out. The same command resumes where it was stopped. docs/data.md says what the corpora are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_dlm.cli.index import index
from megatron_dlm.cli.main import run_and_exit, with_home
from megatron_dlm.data.preprocessing.index import IndexConfig
from megatron_dlm.data.preprocessing.input_files import find_sources
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from megatron_dlm.interfaces import InputError

CORPORA = ("slim-pajama", "nemotron-phase1", "nemotron-phase2")
"""Directories under data/ that recipes under examples/ read."""


def main() -> int:
    """Parse, find the files, index both parts; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", choices=CORPORA, help="name of the directory under data/")
    parser.add_argument("directory", type=Path, help="downloaded files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="as for `megatron-dlm index`")
    parser.add_argument("--output", type=Path, default=Path("data"), help="parent of data/CORPUS (data)")
    parser.add_argument("--key", default="text", help="member or column that holds the text (text)")
    parser.add_argument(
        "--held-out-files", type=int, default=1, help="files to hold out without subdirectories (1)"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that encode; 0: one per CPU (0)")
    parser.add_argument("--max-rejects", type=int, default=0, help="unusable documents to tolerate (0)")
    arguments = parser.parse_args(with_home(sys.argv[1:]))
    # Refused before the files are listed, which may be many.
    load_tokenizer(arguments.tokenizer)
    parts = find_parts(arguments.directory, arguments.held_out_files)
    for name, files in parts.items():
        prefix = arguments.output / arguments.corpus / name
        print(f"{prefix}: {len(files):,} files", file=sys.stderr)
        index(
            IndexConfig(
                input=files,
                output=prefix,
                tokenizer=arguments.tokenizer,
                json_keys=(arguments.key,),
                workers=arguments.workers,
                max_rejects=arguments.max_rejects,
            )
        )
    return 0


def find_parts(directory: Path, held_out_files: int) -> dict[str, tuple[str, ...]]:
    """Files of both parts of a corpus.

    Args:
        directory: downloaded files.
        held_out_files: files that become the validation shard where there are no subdirectories for it.

    Returns:
        Paths by part, train and validation, sorted by name.

    Raises:
        InputError: no files, or not more than are to be held out.
    """
    if not directory.is_dir():
        raise InputError(f"directory: {directory}: no such directory")
    subdirectories = {name: directory / name for name in ("train", "validation")}
    if all(path.is_dir() for path in subdirectories.values()):
        return {name: _files(path) for name, path in subdirectories.items()}
    files = _files(directory)
    if not 1 <= held_out_files < len(files):
        raise InputError(
            f"held-out-files: {held_out_files} is not in [1, {len(files)}), the files in {directory}"
        )
    return {"train": files[:-held_out_files], "validation": files[-held_out_files:]}


def _files(directory: Path) -> tuple[str, ...]:
    return tuple(source.path for source in find_sources([directory]))


if __name__ == "__main__":
    run_and_exit("index_corpus", main)
