"""`megatron-dlm index --stats PREFIX ...`."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from megatron_dlm.cli.arguments import parse
from megatron_dlm.data.preprocessing.input_files import is_url
from megatron_dlm.data.shards.manifest import shard_path
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.data.shards.statistics import ShardStatistics, statistics_of
from megatron_dlm.interfaces import InputError
from megatron_dlm.telemetry.plots import plot_lengths

BAR_WIDTH = 40


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Report document lengths, tokens per source, and duplicate documents of indexed shards."""

    prefixes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Prefixes or URLs of shards made with one tokenizer; documents that occur in more than one shard are
    counted too."""
    pictures: Path | None = None
    """Directory for the length histograms, NAME.lengths.png; None: beside each shard."""


def run(arguments: list[str]) -> int:
    """Parse, count, print; returns the exit code."""
    config = parse(StatsConfig, arguments, verb="index --stats")
    return stats(config.prefixes, config.pictures)


def stats(prefixes: tuple[str, ...], pictures: Path | None = None) -> int:
    """Print what shards hold, and draw their lengths; returns the exit code."""
    shards = [Shard(prefix) for prefix in prefixes]
    if not shards:
        raise InputError("index --stats: no prefix of a shard")
    for shard in shards:
        if shard.manifest.tokenizer_fingerprint != shards[0].manifest.tokenizer_fingerprint:
            raise InputError(f"{shard.prefix}: was made by another tokenizer than {shards[0].prefix}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    found = statistics_of(shards)
    _print_summary(console, found)
    for statistics in found:
        _print_sources(console, statistics)
        _print_histogram(console, statistics)
        _draw(statistics, pictures)
    return 0


def _print_summary(console: Console, found: list[ShardStatistics]) -> None:
    columns = ["shard", "documents", "tokens", *found[0].quantiles, "repeated", "in another shard"]
    table = Table(*columns, title="documents, their lengths in tokens, and copies")
    for statistics in found:
        shard, documents = statistics.shard, len(statistics.lengths)
        table.add_row(
            str(shard.prefix),
            f"{documents:,}",
            f"{shard.manifest.num_tokens:,}",
            *(f"{length:,}" for length in statistics.quantiles.values()),
            f"{statistics.repeats:,} ({statistics.repeats / documents:.2%})",
            f"{statistics.elsewhere:,}" if len(found) > 1 else "-",
        )
    console.print(table)


def _print_sources(console: Console, statistics: ShardStatistics) -> None:
    manifest = statistics.shard.manifest
    table = Table("source", "documents", "tokens", "share", "rejects", title=str(statistics.shard.prefix))
    for source in manifest.sources:
        table.add_row(
            source.path,
            f"{source.documents:,}",
            f"{source.tokens:,}",
            f"{source.tokens / manifest.num_tokens:.1%}",
            f"{source.rejects:,}",
        )
    console.print(table)


def _print_histogram(console: Console, statistics: ShardStatistics) -> None:
    histogram, documents = statistics.histogram(), len(statistics.lengths)
    most = max(count for _, _, count in histogram)
    table = Table("tokens", "documents", "share", "")
    for low, high, count in histogram:
        bar = "#" * round(BAR_WIDTH * count / most)
        table.add_row(f"{low:,} - {high - 1:,}", f"{count:,}", f"{count / documents:.1%}", bar)
    console.print(table)


def _draw(statistics: ShardStatistics, directory: Path | None) -> None:
    prefix = statistics.shard.prefix
    picture = shard_path(prefix if directory is None else directory / prefix.name, ".lengths.png")
    if directory is None and is_url(str(prefix)):
        print("no picture: for shards given by URL, name a local directory with --pictures", file=sys.stderr)
    elif importlib.util.find_spec("matplotlib") is None:
        print("no picture: it needs matplotlib, pip install 'megatron-dlm[eval]'", file=sys.stderr)
    else:
        title = f"{prefix.name}: {len(statistics.lengths):,} documents"
        try:
            plot_lengths(statistics.histogram(), picture, title=title)
            print(picture)
        except OSError as error:
            print(f"no picture: {error}; --pictures names another directory", file=sys.stderr)
