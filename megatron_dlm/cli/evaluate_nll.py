"""`megatron-dlm evaluate nll MODEL`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from megatron_dlm.cli.arguments import ModelArgument, check_new_file, parse_with_model
from megatron_dlm.evaluation.nelbo_statistics import BoundConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.parallel_config import ParallelConfig

if TYPE_CHECKING:
    from megatron_dlm.evaluation.intervals import Mean
    from megatron_dlm.evaluation.nelbo_statistics import Bound
    from megatron_dlm.families.base import ObjectiveConfig
    from megatron_dlm.interfaces import Vocabulary

REPORT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class NllConfig(ModelArgument):
    """Bound on the negative log-likelihood of held-out data (exact for AR), with common random numbers.

    Noise and sequences depend on the seed alone, so models are compared at equal noise, and the result is the
    same for any micro-batch size and parallel layout, and for a checkpoint and its export.
    """

    data: str | None = None
    """Prefix or URL of the held-out shard; None: the run's validation shard, or its first training shard if
    it has none."""
    text: tuple[Path, ...] = ()
    """Files to score instead of a shard: JSON lines, plain text or parquet, compressed or not."""
    bound: tyro.conf.OmitArgPrefixes[BoundConfig] = BoundConfig()
    drop_long_records: bool = False
    """Skip prompt-response records longer than the model's sequence length; if off, such a record is an
    error."""
    micro_batch_size: int = 8
    """Maximum number of sequences per forward pass."""
    tokenizer: Path | None = None
    """Directory of the model's tokenizer, used with text or an exported folder; None: the one in the exported
    folder, or the one that a checkpoint's training data was indexed with."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of an exported folder's weights; a checkpoint is evaluated in the precision of its
    training."""
    output: Path | None = None
    """JSON file to write with the result; None: only print it."""
    plot: Path | None = None
    """PNG file to write with a plot of the loss by diffusion time; None: no plot."""
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise InputError(f"micro_batch_size: {self.micro_batch_size} is below 1")
        if self.data is not None and self.text:
            raise InputError("data, text: give one of them")
        for name in ("output", "plot"):
            check_new_file(name, getattr(self, name))


def run(arguments: list[str]) -> int:
    """Parse, evaluate, report; returns the exit code."""
    config = parse_with_model(NllConfig, arguments, verb="evaluate nll")
    bound, is_first = _evaluate(config)
    if is_first:
        _report(config, bound)
    return 0


def _evaluate(config: NllConfig) -> tuple[Bound, bool]:
    from megatron_dlm.checkpointing.layout import MANIFEST
    from megatron_dlm.evaluation.checkpoint_scoring import bound_of_checkpoint, bound_of_folder
    from megatron_dlm.evaluation.loaded_model import open_model, tokenizer_of_data
    from megatron_dlm.run.run_record import read_run_record

    size, drop = config.micro_batch_size, config.drop_long_records
    if (config.model / MANIFEST).is_file():
        record = read_run_record(config.model)
        _refuse_plot(config, record.config.objective)
        if config.dtype != "fp32":
            raise InputError("dtype: a checkpoint is evaluated in the precision of its training")
        tokenizer = config.tokenizer
        if tokenizer is not None and not config.text:
            raise InputError("tokenizer: only text and exported folders need it")
        if config.text and tokenizer is None:
            tokenizer = tokenizer_of_data(record.config)
        data = record.config.data
        with _data(config, data.validation or data.train[0], tokenizer, record.vocabulary) as prefix:
            return bound_of_checkpoint(
                record,
                prefix,
                config.bound,
                config.parallel,
                size,
                drop_long_records=drop,
                progress=ProgressPrinter(),
            )
    if config.parallel != ParallelConfig():
        raise InputError("parallel: processes share the copies of an exported folder, without other axes")
    loaded = open_model(config.model, tokenizer=config.tokenizer, dtype=config.dtype, device=None)
    _refuse_plot(config, loaded.config.objective)
    data = loaded.config.data
    where = _data(config, data.validation or data.train[0], loaded.tokenizer.path, loaded.vocabulary)
    with loaded.peers.together(), where as prefix:
        bound = bound_of_folder(
            loaded,
            prefix,
            config.bound,
            size,
            drop_long_records=drop,
            progress=ProgressPrinter() if loaded.peers.is_first else lambda done, total: None,
        )
        return bound, loaded.peers.is_first


def _refuse_plot(config: NllConfig, objective: ObjectiveConfig) -> None:
    if config.plot is not None and not objective.has_loss_by_time:
        raise InputError(f"plot: {objective.name} as configured has no loss by diffusion time")


@contextmanager
def _data(config: NllConfig, default: str, tokenizer: Path | None, vocabulary: Vocabulary) -> Iterator[str]:
    """Prefix of the shard, for as long as it is needed."""
    if not config.text:
        yield config.data or default
        return
    from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
    from megatron_dlm.data.tokenizers.special_tokens import names_of
    from megatron_dlm.platform.launch import detect_environment

    if detect_environment().world_size != 1:
        raise InputError("text: for one process; index the files and give --data")
    assert tokenizer is not None
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "text"
        files = tuple(map(str, config.text))
        named = asdict(names_of(vocabulary, tokenizer))
        try:
            build_shards(
                IndexConfig(input=files, output=prefix, tokenizer=tokenizer, **named), lambda progress: None
            )
            yield str(prefix)
        except InputError as error:
            raise InputError(str(error).replace(str(prefix), " ".join(files))) from error


class ProgressPrinter:
    """Prints sequences done and the time to go, every few seconds."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Print progress, given the number of sequences done and the total."""
        from megatron_dlm.telemetry.writers import duration

        now = time.monotonic()
        if now - self._last < REPORT_SECONDS and done < total:
            return
        self._last = now
        left = (total - done) * (now - self._start) / done
        print(f"{done}/{total} sequences | ETA {duration(left)}", file=sys.stderr, flush=True)


def _report(config: NllConfig, bound: Bound) -> None:
    from megatron_dlm.platform.files import write_json

    print(
        f"{config.model}: {show_mean(bound.protocol)} nats/token, {bound.bits_per_byte:.4f} bits/byte, "
        f"perplexity {bound.perplexity:.2f}; complete bound {show_mean(bound.complete)}; "
        f"{bound.sequences:,} sequences, {bound.tokens:,} tokens, {bound.copies} copies each"
    )
    if bound.monte_carlo_error is not None:
        print(f"standard error from noise alone: {bound.monte_carlo_error:.1e} nats/token")
    print_by_time(bound, "nats/token", title="loss by diffusion time", number=".4f")
    if config.output is not None:
        write_json(config.output, asdict(bound))
    if config.plot is not None:
        draw_by_time(bound, config.plot, title=str(config.model))


def print_by_time(bound: Bound, column: str, *, title: str, number: str) -> None:
    """Print a table of a bound, or of a difference of two, by diffusion time, where it has times.

    Args:
        bound: bound, or difference of two bounds, to print.
        column: heading of the column of nats per token.
        title: title of the table.
        number: format of the nats per token; standard errors use the same format without its sign.
    """
    from rich.console import Console
    from rich.table import Table

    if not bound.by_time:
        return
    table = Table("t", column, "standard error", title=title, box=None)
    for band in bound.by_time:
        error = "" if band.standard_error is None else format(band.standard_error, number.lstrip("+"))
        table.add_row(f"{band.first:.3f} to {band.last:.3f}", format(band.nats_per_token, number), error)
    Console(width=100).print(table)


def draw_by_time(bound: Bound, output: Path, *, title: str, of: str = "bound") -> None:
    """Draw a bound, or a difference of two, by diffusion time.

    Args:
        bound: bound, or difference of two bounds, to draw.
        output: PNG file to write.
        title: title of the plot.
        of: name of the quantity drawn, such as "bound" or "difference".
    """
    from megatron_dlm.telemetry.plots import plot_by_time

    bands = [(b.first, b.last, b.nats_per_token, b.half_width or 0.0) for b in bound.by_time]
    plot_by_time(bands, output, title=title, of=of)


def show_mean(mean: Mean, digits: int = 4) -> str:
    """A mean with its confidence interval, as text.

    Args:
        mean: mean and interval, in nats per token.
        digits: decimal places.

    Returns:
        The mean, followed by [low, high] if it has an interval.
    """
    numbers = [mean.nats_per_token, *(end for end in (mean.low, mean.high) if end is not None)]
    texts = [f"{number:.{digits}f}" for number in numbers]
    return texts[0] if len(texts) == 1 else f"{texts[0]} [{texts[1]}, {texts[2]}]"
