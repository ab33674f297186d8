"""`megatron-dlm checkpoint list|inspect|verify|prune`: manages the checkpoints of a run."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_dlm.checkpointing.layout import (
    CHECKPOINTS,
    MANIFEST,
    PROGRESS_RECORD,
    CheckpointRoot,
    read_json,
    verify,
)
from megatron_dlm.cli.arguments import ModelArgument, parse, parse_with_model
from megatron_dlm.interfaces import InputError

USAGE = """usage: megatron-dlm checkpoint list RUN                 complete checkpoints of a run, oldest first
       megatron-dlm checkpoint inspect CHECKPOINT       its run, progress and tensors
       megatron-dlm checkpoint verify CHECKPOINT        check SHA-256 of each file; exit code 2 if one differs
       megatron-dlm checkpoint prune RUN --keep-last K [--keep-every STEPS] [--dry-run]

RUN is a run's directory. CHECKPOINT is RUN, which means its newest one, RUN@STEP, RUN --step STEP, or a
step-NNNNNNNN directory.
"""


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """Complete checkpoints of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""


@dataclass(frozen=True, kw_only=True)
class OneConfig(ModelArgument):
    """One checkpoint."""


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Remove checkpoints of a run; the newest complete one always stays."""

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of the run."""
    keep_last: int
    """Number of newest complete checkpoints to keep; at least 1."""
    keep_every: int = 0
    """Also keep checkpoints whose step is a multiple of this number of steps; 0: keep no others."""
    dry_run: bool = False
    """Only print which checkpoints would be removed."""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise InputError(f"keep_last: {self.keep_last} is below 1")
        if self.keep_every < 0:
            raise InputError(f"keep_every: {self.keep_every} is below 0")


def run(arguments: list[str]) -> int:
    """Run the subcommand named by the first argument; returns the exit code."""
    actions: dict[str, Callable[[list[str]], None]] = {
        "list": _list,
        "inspect": _inspect,
        "verify": _verify,
        "prune": _prune,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] not in actions:
        raise InputError(f"checkpoint: {arguments[0]!r} is not one of {', '.join(actions)}")
    actions[arguments[0]](arguments[1:])
    return 0


def _root(directory: Path) -> CheckpointRoot:
    if not (directory / CHECKPOINTS).is_dir():
        raise InputError(f"run: {directory}: has no directory checkpoints")
    return CheckpointRoot(directory / CHECKPOINTS)


def _size(checkpoint: Path) -> int:
    return sum(entry["bytes"] for entry in read_json(checkpoint / MANIFEST)["files"].values())


def _list(arguments: list[str]) -> None:
    config = parse(ListConfig, arguments, verb="checkpoint list")
    from rich.console import Console
    from rich.table import Table

    table = Table("checkpoint", "step", "samples", "GiB", "saved (UTC)", "processes", box=None)
    for checkpoint in _root(config.run).complete():
        progress = read_json(checkpoint / PROGRESS_RECORD)
        saved = datetime.datetime.fromtimestamp(
            (checkpoint / MANIFEST).stat().st_mtime, tz=datetime.timezone.utc
        )
        table.add_row(
            checkpoint.name,
            f"{progress['step']:,}",
            f"{progress['consumed_samples']:,}",
            f"{_size(checkpoint) / 2**30:.3f}",
            saved.strftime("%Y-%m-%d %H:%M:%S"),
            str(progress["world_size"]),
        )
    Console(width=110).print(table)


def _inspect(arguments: list[str]) -> None:
    config = parse_with_model(OneConfig, arguments, verb="checkpoint inspect")
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from megatron_dlm.checkpointing.safe_metadata import check_metadata
    from megatron_dlm.models.weight_mapping import unpadded_size
    from megatron_dlm.run.run_record import read_run_record

    record = read_run_record(config.model)
    check_metadata(config.model)
    run_config, progress = record.config, read_json(config.model / PROGRESS_RECORD)
    parallel = run_config.parallel
    for name, value in {
        "objective": run_config.objective,
        "model": run_config.model,
        "vocabulary": record.vocabulary,
        "tokenizer": record.tokenizer_fingerprint,
        "data": f"{' '.join(run_config.data.train)}, tokens {record.train_sha256}",
        "precision": run_config.training.precision,
        "saved by": f"{progress['world_size']} processes, {parallel.tensor_model_parallel_size} tensor x "
        f"{parallel.pipeline_model_parallel_size} pipeline parallel",
        "progress": f"step {progress['step']:,} of {run_config.training.num_steps:,}, "
        f"{progress['consumed_samples']:,} samples, last noise {progress['fingerprint']}",
        "size": f"{_size(config.model) / 2**30:.3f} GiB",
    }.items():
        print(f"{name:<10} {value}")
    print("tensors")
    entries = FileSystemReader(config.model).read_metadata().state_dict_metadata
    for name, entry in sorted(entries.items()):
        if isinstance(entry, TensorStorageMetadata):
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            size, stored = unpadded_size(name, entry.size, record.vocabulary.size), list(entry.size)
            padding = "" if size == stored else f", with padding {stored}"
            print(f"  {name}  {dtype} {size}{padding}")


def _verify(arguments: list[str]) -> None:
    config = parse_with_model(OneConfig, arguments, verb="checkpoint verify")
    from megatron_dlm.checkpointing.safe_metadata import check_metadata

    verify(config.model)
    check_metadata(config.model)
    count = len(read_json(config.model / MANIFEST)["files"])
    print(f"{config.model}: {count} files, {_size(config.model):,} bytes, all as in the manifest")


def _prune(arguments: list[str]) -> None:
    config = parse(PruneConfig, arguments, verb="checkpoint prune")
    root = _root(config.run)
    for checkpoint in root.superfluous(config.keep_last, config.keep_every):
        size = _size(checkpoint)
        if not config.dry_run:
            root.remove(checkpoint)
        print(f"{'would remove' if config.dry_run else 'removed'} {checkpoint} ({size / 2**30:.3f} GiB)")
