"""`megatron-dlm tokenizer train`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_dlm.cli.arguments import parse
from megatron_dlm.interfaces import InputError


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """Train a byte-level BPE with [MASK], <eos> and <bos>."""

    input: tuple[Path, ...]
    """Text files, .jsonl or .txt."""
    output: Path
    """Directory for tokenizer.json and tokenizer_config.json."""
    vocab_size: int = 32768
    """Ids in all: 3 special tokens, 256 bytes, merges."""
    json_key: str = "text"
    """Member of each JSON line that holds the text."""


def run(arguments: list[str]) -> int:
    """Parse, train, report; returns the exit code."""
    if arguments[:1] != ["train"]:
        raise InputError("usage: megatron-dlm tokenizer train --input FILE ... --output DIRECTORY")
    config = parse(TokenizerTrainConfig, arguments[1:], verb="tokenizer train")
    from megatron_dlm.data.corpus import check_readable, read_texts
    from megatron_dlm.data.tokenizer import load_tokenizer, train_tokenizer

    for path in config.input:
        check_readable(path)
    texts = chain.from_iterable(read_texts(path, config.json_key) for path in config.input)
    train_tokenizer(texts, config.vocab_size, config.output)
    loaded = load_tokenizer(config.output)
    print(
        f"tokenizer with {loaded.vocabulary.size} ids in {config.output} (SHA-256 {loaded.fingerprint[:16]})"
    )
    return 0
