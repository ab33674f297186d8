"""`megatron-dlm index`."""

from __future__ import annotations

import sys
import time

from megatron_dlm.cli.arguments import parse
from megatron_dlm.data.indexing import IndexConfig, IndexProgress, build_shard

REPORT_SECONDS = 2.0


def run(arguments: list[str]) -> int:
    """Parse, index, report; returns the exit code."""
    config = parse(IndexConfig, arguments, verb="index")
    reported = time.monotonic()

    def report(progress: IndexProgress) -> None:
        nonlocal reported
        if time.monotonic() - reported >= REPORT_SECONDS:
            reported = time.monotonic()
            print(_line(progress), file=sys.stderr, flush=True)

    manifest = build_shard(config, report)
    print(
        f"{config.output}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens "
        f"({manifest.dtype}), {manifest.bytes_per_token:.3f} bytes/token, "
        f"unigram entropy {manifest.unigram_entropy_nats:.4f} nats/token, encoded by {manifest.backend}"
    )
    return 0


def _line(progress: IndexProgress) -> str:
    seconds = max(progress.seconds, 1e-9)
    return (
        f"{progress.documents:,} documents | {progress.tokens:,} tokens | "
        f"{progress.text_bytes / 1e6 / seconds:.1f} MB/s | {progress.tokens / seconds:,.0f} tokens/s"
    )
