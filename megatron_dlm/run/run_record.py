"""What a checkpoint says of the run that wrote it, and where a run's checkpoints are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.checkpointing.layout import (
    CHECKPOINTS,
    RUN_RECORD,
    CheckpointRoot,
    read_json,
    read_manifest,
)
from megatron_dlm.interfaces import Vocabulary
from megatron_dlm.platform.codec import decode
from megatron_dlm.run.config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

EXPORT_CONFIG = "config.json"
"""Marks an exported folder."""


@dataclass(frozen=True)
class RunRecord:
    """What a checkpoint says of the run that wrote it."""

    directory: Path
    config: RunConfig
    vocabulary: Vocabulary
    tokenizer_fingerprint: str
    train_sha256: str
    averaged: bool = False
    """Whether the moving averages of the weights are meant, not the weights."""


def read_run_record(checkpoint: Path) -> RunRecord:
    """The record of one checkpoint.

    Args:
        checkpoint: a step-NNNNNNNN directory.

    Returns:
        Its configuration and vocabulary.

    Raises:
        InputError: not a complete checkpoint, or a record of another version.
    """
    read_manifest(checkpoint)
    path = checkpoint / RUN_RECORD
    data = read_json(path)
    return RunRecord(
        directory=checkpoint,
        config=decode(RunConfig, data.get("config"), f"{path}: config"),
        vocabulary=decode(Vocabulary, data.get("vocabulary"), f"{path}: vocabulary"),
        tokenizer_fingerprint=str(data.get("tokenizer_fingerprint")),
        train_sha256=str(data.get("train_sha256")),
    )


def checkpoint_root(config: RunConfig) -> CheckpointRoot:
    """The directory of a run's checkpoints."""
    return CheckpointRoot(config.directory / CHECKPOINTS)


@dataclass(frozen=True)
class OutsideStart:
    """Weights not saved by a training run of this package: from the paper's code or an exported folder."""

    directory: Path
    """The `.ckpt` file or the folder."""
    state: Mapping[str, Tensor]
    """Full tensors by public name, not read yet."""
    check: Callable[[], None] = lambda: None
    """Reads them all and refuses damaged ones."""
