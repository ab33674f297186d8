"""Imports weights of an exported folder or of the paper's code as a checkpoint that any layout can load."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dlm.checkpointing.layout import CHECKPOINTS, CheckpointRoot
from megatron_dlm.data.tokenizers.special_tokens import AS_IN_ITS_FILES, SpecialTokens
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.platform.codec import encode
from megatron_dlm.platform.files import check_new
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import start_parallel, stop_parallel
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.run_record import OutsideStart

SAVE_SECONDS = 3600.0


@dataclass(frozen=True)
class Imported:
    """Weights and metadata to be written as a checkpoint."""

    config: RunConfig
    vocabulary: Vocabulary
    tokenizer_fingerprint: str
    train_sha256: str
    step: int
    weights: OutsideStart


def read_folder(path: Path, recipe: RunConfig | None = None) -> Imported:
    """An exported folder, also one that transformers has saved again.

    Args:
        path: folder.
        recipe: settings of its training, for a folder without the record of its run; None: not given.

    Returns:
        Metadata and weights of the folder; the weights are read later.

    Raises:
        InputError: unusable folder, or a recipe that is missing or does not fit.
    """
    from megatron_dlm.conversion.exported_run import read_exported_run, with_recipe
    from megatron_dlm.conversion.from_hugging_face import ExportedFolder

    folder = ExportedFolder(path)
    run = with_recipe(read_exported_run(folder), path, recipe)
    weights = folder.weights(run.config.model, run.vocabulary)
    return Imported(
        config=run.config,
        vocabulary=run.vocabulary,
        tokenizer_fingerprint=run.tokenizer_fingerprint or folder.tokenizer_fingerprint or "",
        train_sha256=run.train_sha256,
        step=run.step,
        weights=OutsideStart(path, weights, folder.refuse_altered_weights),
    )


def read_published(
    path: Path, config: RunConfig, tokenizer: Path | None = None, named: SpecialTokens = AS_IN_ITS_FILES
) -> Imported:
    """A folder of a published model, whose tensors have the names of the paper's code.

    Args:
        path: folder with config.json and weights, as safetensors or torch.save files.
        config: configuration with the model and objective of the weights.
        tokenizer: directory of the model's tokenizer; None: the folder itself.
        named: special tokens named by hand.

    Returns:
        Metadata and weights of the folder.

    Raises:
        InputError: the folder or its tokenizer cannot be used, or tensors do not fit the model.
    """
    from megatron_dlm.conversion.published_folder import PublishedFolder
    from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer

    folder = PublishedFolder(path)
    if tokenizer is None and folder.tokenizer_fingerprint is None:
        raise InputError(f"tokenizer: {path} has no tokenizer.json; give the directory of its tokenizer")
    loaded = load_tokenizer(tokenizer or path, named=named)
    weights = folder.weights(config.model, loaded.vocabulary)
    return Imported(config, loaded.vocabulary, loaded.fingerprint, "", 0, OutsideStart(path, weights))


def read_reference(
    path: Path, config: RunConfig, tokenizer: Path, named: SpecialTokens = AS_IN_ITS_FILES
) -> Imported:
    """A checkpoint of the paper's code.

    Args:
        path: Lightning `.ckpt` file.
        config: configuration with the checkpoint's model and objective.
        tokenizer: directory of the model's tokenizer.
        named: special tokens named by hand.

    Returns:
        Metadata and weights of the checkpoint.

    Raises:
        InputError: the file cannot be used, or its tensors have other shapes.
    """
    from megatron_dlm.conversion.reference import read_reference_checkpoint
    from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer, named=named)
    state = read_reference_checkpoint(path, config.model, loaded.vocabulary)
    return Imported(config, loaded.vocabulary, loaded.fingerprint, "", 0, OutsideStart(path, state))


def import_weights(imported: Imported, output: Path) -> Path:
    """Write the checkpoint, on one process; training can initialize from it but cannot resume it.

    Args:
        imported: weights and their metadata.
        output: directory to create.

    Returns:
        Directory of the checkpoint inside `output`.

    Raises:
        InputError: `output` exists, or the weights are damaged.
        SaveError: the checkpoint could not be written; a partial checkpoint is removed.
    """
    environment = detect_environment()
    if environment.world_size != 1:
        raise InputError(f"import: started on {environment.world_size} processes; it takes one")
    check_new(output)
    imported.weights.check()
    parallel = start_parallel(environment, ParallelConfig())
    from megatron_dlm.checkpointing.async_writer import SavePlans
    from megatron_dlm.checkpointing.layout import PROGRESS_RECORD, RUN_RECORD
    from megatron_dlm.checkpointing.manager import PendingSave
    from megatron_dlm.models.weight_mapping import local_tensors
    from megatron_dlm.run.model import build_denoiser

    config = replace(
        imported.config,
        directory=output,
        parallel=ParallelConfig(),
        training=replace(imported.config.training, precision="fp32"),
    )
    denoiser = build_denoiser(config, imported.vocabulary, parallel)
    for parameter, tensor in local_tensors(imported.weights.state, denoiser, parallel).items():
        parameter.data.copy_(tensor)
    root = CheckpointRoot(output / CHECKPOINTS)
    records: dict[str, Any] = {
        RUN_RECORD: {
            "config": encode(config),
            "vocabulary": encode(imported.vocabulary),
            "tokenizer_fingerprint": imported.tokenizer_fingerprint,
            "train_sha256": imported.train_sha256,
        },
        PROGRESS_RECORD: {
            "imported": str(imported.weights.directory),
            "step": imported.step,
            "consumed_samples": 0,
            "fingerprint": 0,
            "world_size": 1,
        },
    }
    PendingSave(
        root, imported.step, denoiser, None, parallel, SavePlans(parallel), records, SAVE_SECONDS
    ).finish()
    stop_parallel()
    return root.final(imported.step)
