"""Imports weights of an exported folder or of the paper's code as a checkpoint that any layout can load."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dlm.checkpointing.layout import CHECKPOINTS, CheckpointRoot
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.platform.codec import decode, encode
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


def read_folder(path: Path) -> Imported:
    """An exported folder with the record of its run.

    Args:
        path: exported folder.

    Returns:
        Metadata and weights of the folder; the weights are read later.

    Raises:
        InputError: unusable folder.
    """
    from megatron_dlm.conversion.from_hugging_face import ExportedFolder

    folder = ExportedFolder(path)
    record, where = folder.record, f"{path}: megatron_dlm_run.json"
    config = decode(RunConfig, record.get("config"), f"{where}: config")
    vocabulary = decode(Vocabulary, record.get("vocabulary"), f"{where}: vocabulary")
    folder.refuse_other(config.model, vocabulary)
    weights = folder.weights(config.model, vocabulary)
    step = record.get("step", 0)
    if type(step) is not int or step < 0:
        raise InputError(f"{where}: step: {step!r} is not a number of steps")
    hashes = [record.get(name) for name in ("tokenizer_fingerprint", "train_sha256")]
    if not all(isinstance(value, str) for value in hashes):
        raise InputError(f"{where}: tokenizer_fingerprint, train_sha256: {hashes} are not both texts")
    return Imported(
        config=config,
        vocabulary=vocabulary,
        tokenizer_fingerprint=str(hashes[0]),
        train_sha256=str(hashes[1]),
        step=step,
        weights=OutsideStart(path, weights, folder.refuse_altered_weights),
    )


def read_reference(path: Path, config: RunConfig, tokenizer: Path) -> Imported:
    """A checkpoint of the paper's code.

    Args:
        path: Lightning `.ckpt` file.
        config: configuration with the checkpoint's model and objective.
        tokenizer: directory of the model's tokenizer.

    Returns:
        Metadata and weights of the checkpoint.

    Raises:
        InputError: the file cannot be used, or its tensors have other shapes.
    """
    from megatron_dlm.conversion.reference import read_reference_checkpoint
    from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
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
