"""`megatron-dlm export CHECKPOINT OUTPUT`: a Hugging Face folder, or a .ckpt of the paper's code."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_dlm.checkpointing.layout import REFERENCE_SUFFIX
from megatron_dlm.cli.arguments import ModelArgument, parse_with_model
from megatron_dlm.interfaces import InputError


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelArgument):
    """Export a checkpoint as a Hugging Face folder (safetensors, remote code, tokenizer) and verify it.

    A separate process loads the folder with transformers and compares tensors, logits, bound and a sampling
    trace with the trained model; export_report.json records the comparison.

    If OUTPUT ends in .ckpt, the fp32 weights are written as a Lightning checkpoint that the paper's code
    loads; no other argument applies then.
    """

    output: Annotated[Path, tyro.conf.Positional]
    """Folder, or .ckpt file, to write; must not exist yet."""
    tokenizer: Path | None = None
    """Directory of the tokenizer the data was indexed with, which is copied into the folder; None: the
    directory recorded when the data was indexed."""
    data: str | None = None
    """Prefix of the shard used for the comparison; None: the run's validation data."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the exported weights. The comparison allows relative differences of 1e-5 at fp32, 2e-2 at
    bf16, 5e-3 at fp16."""
    max_shard_size: str = "5GB"
    """Maximum size of one weight file, such as 5GB or 500MB; writing needs about as much memory, while the
    comparison needs memory for the whole model."""
    verify: bool = True
    """Compare the exported folder with the trained model; --no-verify skips the comparison."""

    averaged: bool = False
    """Export the moving averages of the weights, which a run has by optimizer.ema_decay."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*([KMGT]B)?", self.max_shard_size):
            raise InputError(f"max_shard_size: {self.max_shard_size!r} is not bytes, such as 5GB or 500MB")
        if self.output.suffix != REFERENCE_SUFFIX:
            return
        for field in fields(self):
            if (
                field.name not in ("model", "step", "output", "averaged")
                and getattr(self, field.name) != field.default
            ):
                raise InputError(f"{field.name}: not for a {REFERENCE_SUFFIX}")


def run(arguments: list[str]) -> int:
    """Parse, export, report; returns the exit code."""
    config = parse_with_model(ExportConfig, arguments, verb="export")
    from megatron_dlm.conversion.export import export_checkpoint, export_reference_checkpoint
    from megatron_dlm.run.run_record import read_run_record

    record = replace(read_run_record(config.model), averaged=config.averaged)
    if config.output.suffix == REFERENCE_SUFFIX:
        export_reference_checkpoint(record, config.output)
        print(f"{config.output}: {record.config.objective.name} weights, fp32")
        return 0
    report = export_checkpoint(
        record,
        config.output,
        tokenizer=config.tokenizer,
        data=config.data,
        dtype=config.dtype,
        max_shard_size=config.max_shard_size,
        verify=config.verify,
    )
    print(f"{config.output}: {record.config.objective.name} model, {config.dtype}")
    print(report or "not compared with the trained model")
    return 0
