"""`megatron-dlm export CHECKPOINT OUTPUT`: a Hugging Face folder, or a .ckpt of the paper's code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_dlm.cli.arguments import parse
from megatron_dlm.interfaces import InputError

CHECK_SAMPLES = 8
REFERENCE_SUFFIX = ".ckpt"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a checkpoint as a Hugging Face folder (safetensors, remote code, tokenizer).

    With an OUTPUT that ends in .ckpt, and no other argument: the weights as the paper's code loads them.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A step-NNNNNNNN directory, of any layout."""
    output: Annotated[Path, tyro.conf.Positional]
    """Folder to make; must not exist."""
    tokenizer: Path
    """Directory of the tokenizer the data was indexed with; copied into the folder."""
    data: str
    """Prefix of a shard for the fixed-noise check, for example the held-out one."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the exported weights."""


@dataclass(frozen=True, kw_only=True)
class ReferenceExportConfig:
    """Write a checkpoint's weights in fp32 as a Lightning .ckpt that the paper's code loads."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A step-NNNNNNNN directory, of any layout."""
    output: Annotated[Path, tyro.conf.Positional]
    """File to make, ending in .ckpt; must not exist."""


def _run_reference(arguments: list[str]) -> int:
    config = parse(ReferenceExportConfig, arguments, verb="export")
    from megatron_dlm.training.run import read_run_record
    from megatron_dlm.training.use_checkpoint import export_reference_checkpoint

    record = read_run_record(config.checkpoint)
    if config.output.exists():
        raise InputError(f"output: {config.output} exists already")
    export_reference_checkpoint(record, config.output)
    print(f"{config.output}: {record.config.objective.name} weights, fp32")
    return 0


def run(arguments: list[str]) -> int:
    """Parse, export, report; returns the exit code."""
    if len(arguments) == 2 and arguments[1].endswith(REFERENCE_SUFFIX):
        return _run_reference(arguments)
    config = parse(ExportConfig, arguments, verb="export")
    from megatron_dlm.data.tokenizer import load_tokenizer
    from megatron_dlm.training.run import read_run_record

    record = read_run_record(config.checkpoint)
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.fingerprint != record.tokenizer_fingerprint:
        raise InputError(f"tokenizer: {config.tokenizer} is not the one the model was trained with")
    if tokenizer.library != "tokenizers":
        raise InputError(
            f"tokenizer: {config.tokenizer} is not a Hugging Face directory, which an export ships"
        )
    if config.output.exists():
        raise InputError(f"output: {config.output} exists already")
    from megatron_dlm.training.use_checkpoint import export_checkpoint

    export_checkpoint(record, tokenizer, config.data, config.output, config.dtype, CHECK_SAMPLES)
    print(f"{config.output}: {record.config.objective.name} model, {config.dtype}")
    return 0
