"""`megatron-dlm index --adopt PREFIX --tokenizer TOKENIZER`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_dlm.cli.arguments import parse
from megatron_dlm.data.preprocessing.adopt import AdoptedShard, adopt_shard
from megatron_dlm.data.tokenizers.special_tokens import SpecialTokens
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)
REPORT_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class AdoptConfig(SpecialTokens):
    """Check shards that Megatron-LM's preprocess_data.py has written, and write their manifests.

    Everything is read once: that the index fits the tokens, that each id is the tokenizer's, that the mask id
    does not occur, and which documents have no end. The tokens stay as they are.
    """

    adopt: tuple[Path, ...]
    """Prefixes of the shards: PREFIX.bin and PREFIX.idx are read, PREFIX.json is written."""
    tokenizer: Path
    """The tokenizer that made the ids, as for indexing."""


def run(arguments: list[str]) -> int:
    """Parse, check, report; returns the exit code."""
    config = parse(AdoptConfig, arguments, verb="index")
    adopt(config.adopt, config.tokenizer, config.named_tokens())
    return 0


def adopt(prefixes: tuple[Path, ...], tokenizer: Path, named: SpecialTokens) -> None:
    """Adopt shards and print what they are.

    Args:
        prefixes: paths of the shards without suffix.
        tokenizer: the tokenizer that made their ids.
        named: its special tokens, where named by hand.
    """
    loaded = load_tokenizer(tokenizer, named=named)
    for prefix in prefixes:
        _print(prefix, adopt_shard(prefix, loaded, _progress_of(prefix)))


def _print(prefix: Path, shard: AdoptedShard) -> None:
    manifest = shard.manifest
    print(
        f"{prefix}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens ({manifest.dtype}), "
        f"{manifest.bytes_per_token:.3f} bytes/token, unigram entropy {manifest.unigram_entropy_nats:.4f} "
        "nats/token, adopted"
    )
    for text in shard.samples:
        print(f"  begins: {text!r}")
    if shard.unended:
        logger.warning(
            f"{prefix}: {shard.unended:,} of {manifest.num_documents:,} documents do not end with <eos>, "
            f"the first is document {shard.first_unended:,}"
        )


def _progress_of(prefix: Path) -> Callable[[int, int], None]:
    """A function that prints how far the reading has come, every few seconds."""
    from megatron_dlm.telemetry.writers import duration

    started = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < REPORT_SECONDS:
            return
        told, rate = now, done / (now - started)
        eta = duration((total - done) / rate)
        print(
            f"{prefix}: {done / total:.0%} | {rate / 1e9:.2f} GB/s | ETA {eta}", file=sys.stderr, flush=True
        )

    return tell
