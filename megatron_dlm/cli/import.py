"""`megatron-dlm import SOURCE OUTPUT`: a Hugging Face folder or a .ckpt becomes a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from megatron_dlm.checkpointing.layout import REFERENCE_SUFFIX
from megatron_dlm.cli.arguments import parse
from megatron_dlm.data.tokenizers.special_tokens import SpecialTokens
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from megatron_dlm.conversion.import_weights import Imported
    from megatron_dlm.run.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ImportConfig(SpecialTokens):
    """Import weights as a checkpoint that any parallel layout can load; no code stored with them is executed.

    SOURCE is a folder that `megatron-dlm export` made, also one that transformers or peft has saved again;
    a Lightning .ckpt of the paper's code, which needs --recipe and --tokenizer; or the folder of a published
    model, safetensors or .bin files with the names of the paper's code, which needs --recipe. Training can
    start from an exported folder, a .ckpt, or the imported checkpoint, with --checkpoint.initialize-from.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Folder or .ckpt file."""
    output: Annotated[Path, tyro.conf.Positional]
    """Directory to create; the checkpoint is written to its subdirectory checkpoints/."""
    recipe: Path | None = None
    """Recipe file that defines model, objective and training; required for a .ckpt file, a published folder
    and a folder without megatron_dlm_run.json, not allowed for other folders."""
    tokenizer: Path | None = None
    """Directory of the tokenizer; required for a .ckpt file, not allowed for an exported folder; None: the
    published folder's own. Its special tokens may be named by --eos-token, --bos-token and --mask-token."""


def run(arguments: list[str]) -> int:
    """Parse, import, report; returns the exit code."""
    config = parse(ImportConfig, arguments, verb="import")
    from megatron_dlm.conversion.import_weights import import_weights
    from megatron_dlm.run.config import load_recipe

    imported = _read(config, None if config.recipe is None else load_recipe(config.recipe))
    checkpoint = import_weights(imported, config.output)
    print(f"{checkpoint}: {imported.config.objective.name} weights, fp32")
    return 0


def _read(config: ImportConfig, recipe: RunConfig | None) -> Imported:
    from megatron_dlm.conversion.from_hugging_face import MODEL_TYPE, WeightFolder
    from megatron_dlm.conversion.import_weights import read_folder, read_published, read_reference

    named = config.named_tokens()
    if config.source.suffix == REFERENCE_SUFFIX:
        if recipe is None or config.tokenizer is None:
            raise InputError("recipe, tokenizer: a .ckpt says neither shape nor vocabulary; give both")
        return read_reference(config.source, recipe, config.tokenizer, named)
    if WeightFolder(config.source).config.get("model_type") == MODEL_TYPE:
        given = {name: value for name, value in vars(named).items() if value}
        if config.tokenizer is not None:
            given["tokenizer"] = str(config.tokenizer)
        for name, value in given.items():
            raise InputError(f"{name}: {value}, and an exported folder has its own tokenizer")
        return read_folder(config.source, recipe)
    if recipe is None:
        raise InputError(
            f"recipe: {config.source} is no folder of `megatron-dlm export`; a published one needs a recipe "
            "with its family and shape"
        )
    return read_published(config.source, recipe, config.tokenizer, named)
