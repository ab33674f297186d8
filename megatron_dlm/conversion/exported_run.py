"""What an exported folder says of its run: the run's record, or where there is none, config.json."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_dlm.conversion.from_hugging_face import ExportedFolder
from megatron_dlm.conversion.to_hugging_face import (
    CONFIG,
    EXPORTED_TOKENIZER,
    RUN,
    hugging_face_fields,
)
from megatron_dlm.data.loading.data_config import DataConfig
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.platform.codec import decode
from megatron_dlm.run.config import RunConfig, TrainingConfig
from megatron_dlm.run.lr_schedule import LrScheduleConfig

UNKNOWN_DATA = "(data that the exported folder does not name)"


@dataclass(frozen=True, kw_only=True)
class ExportedRun:
    """The run of an exported folder."""

    config: RunConfig
    """Its configuration; without a record, model, objective and sequence length alone are true."""
    vocabulary: Vocabulary
    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer that the training data was indexed with; empty if unknown."""
    tokenizer_files: frozenset[str]
    """SHA-256 of every tokenizer.json that is the model's; empty if unknown."""
    train_sha256: str
    """SHA-256 of the training tokens; empty if unknown."""
    step: int
    is_recorded: bool
    """Whether the folder has the run's record."""


def read_exported_run(folder: ExportedFolder) -> ExportedRun:
    """The run of a folder, checked against its config.json and tensors.

    Args:
        folder: opened folder.

    Returns:
        The run. A folder that transformers saved again may have another vocabulary than its record.

    Raises:
        InputError: a damaged record, or model and tensors that do not fit it.
    """
    run = _recorded(folder) if (folder.path / RUN).exists() else _described(folder)
    folder.refuse_other(run.config.model, run.vocabulary)
    return run


def _recorded(folder: ExportedFolder) -> ExportedRun:
    record, where = folder.record, f"{folder.path}: {RUN}"
    config = decode(RunConfig, record.get("config"), f"{where}: config")
    vocabulary = decode(Vocabulary, record.get("vocabulary"), f"{where}: vocabulary")
    step = record.get("step", 0)
    if type(step) is not int or step < 0:
        raise InputError(f"{where}: step: {step!r} is not a number of steps")
    hashes = [record.get(name) for name in ("tokenizer_fingerprint", "train_sha256")]
    if not all(isinstance(value, str) for value in hashes):
        raise InputError(f"{where}: tokenizer_fingerprint, train_sha256: {hashes} are not both texts")
    files = frozenset({str(hashes[0]), str(record.get(EXPORTED_TOKENIZER, hashes[0]))})
    if folder.is_saved_again:
        # Its tokenizer was saved again, too, and may have new tokens.
        vocabulary, files = _vocabulary(folder), frozenset()
    return ExportedRun(
        config=config,
        vocabulary=vocabulary,
        tokenizer_fingerprint=str(hashes[0]),
        tokenizer_files=files,
        train_sha256=str(hashes[1]),
        step=step,
        is_recorded=True,
    )


def _described(folder: ExportedFolder) -> ExportedRun:
    """The run of a folder without a record, as far as config.json tells it."""
    given, where = folder.config, f"{folder.path}: {CONFIG}"
    names = {
        "num_layers": "num_hidden_layers",
        "ffn_hidden_size": "intermediate_size",
    }
    shape = {field.name: given.get(names.get(field.name, field.name)) for field in fields(ModelConfig)}
    length = given.get("max_position_embeddings")
    data = {"train": [UNKNOWN_DATA], "validation": UNKNOWN_DATA, "seq_length": length}
    config = RunConfig(
        directory=folder.path,
        model=decode(ModelConfig, shape, where),
        objective=_objective(given, where),
        data=decode(DataConfig, data, where),
        training=TrainingConfig(num_steps=1, global_batch_size=1),
        schedule=LrScheduleConfig(),
    )
    return ExportedRun(
        config=config,
        vocabulary=_vocabulary(folder),
        tokenizer_fingerprint="",
        tokenizer_files=frozenset(),
        train_sha256="",
        step=0,
        is_recorded=False,
    )


def _vocabulary(folder: ExportedFolder) -> Vocabulary:
    """The vocabulary that config.json names."""
    names = {"size": "vocab_size"}
    given = {field.name: folder.config.get(names.get(field.name, field.name)) for field in fields(Vocabulary)}
    return decode(Vocabulary, given, f"{folder.path}: {CONFIG}")


def _objective(given: dict[str, Any], where: str) -> ObjectiveConfig:
    """The family, with those of its settings that an export's configuration has."""
    name = given.get("family")
    if name not in OBJECTIVES:
        raise InputError(f"{where}: family: {name!r} is not one of {', '.join(OBJECTIVES)}")
    cls = OBJECTIVES[name]
    settings = {field.name: given[field.name] for field in fields(cls) if field.name in given}
    return decode(cls, settings, where)


def with_recipe(run: ExportedRun, folder: Path, recipe: RunConfig | None) -> ExportedRun:
    """The run with the training settings of a recipe, which a folder without a record needs.

    Args:
        run: run of the folder.
        folder: path of the folder, for messages.
        recipe: configuration; None: none was given.

    Returns:
        The run.

    Raises:
        InputError: no recipe is given and the folder has no record, or both are there, or the recipe is of
            another model.
    """
    if run.is_recorded:
        if recipe is not None:
            raise InputError(f"recipe: {folder} has its own, in {RUN}")
        return run
    if recipe is None:
        raise InputError(
            f"{folder}: has no {RUN}, as it was saved by other code; give --recipe with the settings of its "
            "training"
        )
    theirs = hugging_face_fields(recipe.model, run.vocabulary, recipe.objective)
    ours = hugging_face_fields(run.config.model, run.vocabulary, run.config.objective)
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise InputError(f"recipe: its {name} {theirs.get(name)!r} is not {folder}'s {value!r}")
    return replace(run, config=recipe)
