"""`megatron-dlm tokenizer train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.cli.arguments import parse
from megatron_dlm.interfaces import InputError


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """Train a byte-level BPE tokenizer with the special tokens [MASK], <eos> and <bos>."""

    input: tuple[str, ...]
    """Text to train on: files, globs, directories or URLs, as for `megatron-dlm index`."""
    output: Path
    """Directory to write tokenizer.json and tokenizer_config.json to."""
    vocab_size: int = 32768
    """Vocabulary size: 3 special tokens, 256 bytes, and BPE merges for the rest; at least 259."""
    json_key: str = "text"
    """Key of each JSON line, or Parquet column, that holds the text."""


def run(arguments: list[str]) -> int:
    """Parse, train, report; returns the exit code."""
    if arguments[:1] != ["train"]:
        raise InputError("usage: megatron-dlm tokenizer train --input FILE ... --output DIRECTORY")
    config = parse(TokenizerTrainConfig, arguments[1:], verb="tokenizer train")
    from megatron_dlm.data.preprocessing.document_readers import read_texts
    from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer

    train_tokenizer(read_texts(config.input, config.json_key), config.vocab_size, config.output)
    loaded = load_tokenizer(config.output)
    print(
        f"tokenizer with {loaded.vocabulary.size} ids in {config.output} (SHA-256 {loaded.fingerprint[:16]})"
    )
    return 0
