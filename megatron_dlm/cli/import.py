"""`megatron-dlm import SOURCE OUTPUT`: a Hugging Face folder or a .ckpt becomes a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_dlm.checkpointing.layout import REFERENCE_SUFFIX
from megatron_dlm.cli.arguments import parse
from megatron_dlm.interfaces import InputError


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Import weights as a checkpoint that any parallel layout can load; no code stored with them is executed.

    SOURCE is a folder that `megatron-dlm export` made, also one that transformers or peft has saved again, or
    a Lightning .ckpt of the paper's code, which needs --recipe and --tokenizer. Training can start from
    SOURCE, or from the imported checkpoint, with --checkpoint.initialize-from.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Exported folder or .ckpt file."""
    output: Annotated[Path, tyro.conf.Positional]
    """Directory to create; the checkpoint is written to its subdirectory checkpoints/."""
    recipe: Path | None = None
    """Recipe file that defines model, objective and training; required for a .ckpt file and for a folder
    without megatron_dlm_run.json, not allowed for other folders."""
    tokenizer: Path | None = None
    """Directory of the tokenizer; required for a .ckpt file, not allowed for a folder."""


def run(arguments: list[str]) -> int:
    """Parse, import, report; returns the exit code."""
    config = parse(ImportConfig, arguments, verb="import")
    from megatron_dlm.conversion.import_weights import import_weights, read_folder, read_reference
    from megatron_dlm.run.config import load_recipe

    if config.source.suffix == REFERENCE_SUFFIX:
        if config.recipe is None or config.tokenizer is None:
            raise InputError("recipe, tokenizer: a .ckpt says neither shape nor vocabulary; give both")
        imported = read_reference(config.source, load_recipe(config.recipe), config.tokenizer)
    else:
        if config.tokenizer is not None:
            raise InputError("tokenizer: an exported folder has its own")
        imported = read_folder(config.source, None if config.recipe is None else load_recipe(config.recipe))
    checkpoint = import_weights(imported, config.output)
    print(f"{checkpoint}: {imported.config.objective.name} weights, fp32")
    return 0
