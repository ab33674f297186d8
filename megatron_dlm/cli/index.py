"""`megatron-dlm index`."""

from __future__ import annotations

import math
import sys

from megatron_dlm.cli.arguments import parse
from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.data.preprocessing.workers import IndexProgress


def run(arguments: list[str]) -> int:
    """Parse, index, report; returns the exit code.

    `--stats PREFIX ...` reports on existing shards, `--adopt PREFIX` gives one of Megatron-LM's a manifest.
    """
    if any(word == "--adopt" or word.startswith("--adopt=") for word in arguments):
        from megatron_dlm.cli.index_adopt import run as run_adopt

        return run_adopt(arguments)
    if "--stats" in arguments and not any(word.startswith("--input") for word in arguments):
        from megatron_dlm.cli.index_stats import run as run_stats

        return run_stats([word for word in arguments if word != "--stats"])
    return index(parse(IndexConfig, arguments, verb="index"))


def index(config: IndexConfig) -> int:
    """Index and report; returns the exit code."""
    manifests = build_shards(config, report)
    for prefix, manifest in zip(config.prefixes(), manifests, strict=bool(manifests)):
        print(
            f"{prefix}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens "
            f"({manifest.dtype}), {manifest.bytes_per_token:.3f} bytes/token, "
            f"unigram entropy {manifest.unigram_entropy_nats:.4f} nats/token, encoded by {manifest.backend}"
        )
    if manifests and config.stats:
        from megatron_dlm.cli.index_stats import stats

        stats(tuple(map(str, config.prefixes())))
    if not manifests and config.shard:
        print(f"{config.output}: this job has no more to do; the last job joins the parts", file=sys.stderr)
    return 0


def report(progress: IndexProgress) -> None:
    """Print one line of progress on standard error."""
    from megatron_dlm.telemetry.writers import duration

    eta = duration(progress.eta_seconds) if math.isfinite(progress.eta_seconds) else "-"
    print(
        f"{progress.stored_bytes / max(1, progress.total_bytes):.0%} | {progress.documents:,} documents | "
        f"{progress.tokens:,} tokens | {progress.text_bytes_per_second / 1e6:.1f} MB/s | "
        f"{progress.documents_per_second:,.0f} documents/s | {progress.tokens_per_second:,.0f} tokens/s | "
        f"ETA {eta}",
        file=sys.stderr,
        flush=True,
    )
