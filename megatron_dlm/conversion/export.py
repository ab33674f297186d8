"""Exports a checkpoint to other formats and verifies that the export equals the trained model."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dlm.checkpointing.layout import PROGRESS_RECORD, RUN_RECORD, read_json
from megatron_dlm.data.shards.manifest import read_manifest
from megatron_dlm.data.shards.token_file import as_path
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from megatron_dlm.interfaces import InputError, TokenBatch, TrainingError
from megatron_dlm.models.config import Precision
from megatron_dlm.platform.files import check_new
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.datasets import open_held_out
from megatron_dlm.run.open_checkpoint import open_checkpoint
from megatron_dlm.run.run_record import RunRecord

if TYPE_CHECKING:
    from megatron_dlm.conversion.to_hugging_face import ExportDtype, ExportSource
    from megatron_dlm.data.tokenizers.encoders import LoadedTokenizer

VERIFY_SECONDS = 3600
CHECK_SAMPLES = 8


def export_checkpoint(
    record: RunRecord,
    output: Path,
    *,
    tokenizer: Path | None,
    data: str | None,
    dtype: ExportDtype,
    max_shard_size: str,
    verify: bool,
) -> str:
    """Write one checkpoint as a Hugging Face folder, on one process.

    The weights are copied one file at a time. Verification loads the whole trained model in this process,
    and then the exported folder in a separate process.

    Args:
        record: run record of the checkpoint.
        output: folder to create; it appears only when complete and, with `verify`, verified.
        tokenizer: directory of the tokenizer that the data was indexed with; None: its path at that time.
        data: prefix of a shard for the verification; None: the run's held-out data.
        dtype: precision of the exported weights.
        max_shard_size: largest size of a weight file, for example "5GB".
        verify: compare the exported folder with the trained model.

    Returns:
        Report of the verification; empty without `verify`.

    Raises:
        InputError: the checkpoint, tokenizer or data cannot be used, or `output` exists.
        TrainingError: the folder differs from the trained model; the folder is removed.
    """
    _require_one_process()
    if verify and find_spec("transformers") is None:
        raise InputError("verify: needs transformers; install megatron-dlm[hf], or give --no-verify")
    data = data or record.config.data.validation or record.config.data.train[0]
    loaded = _tokenizer(record, tokenizer, data)
    from megatron_dlm.conversion.to_hugging_face import new_folder, write_card, write_folder

    source = _source(record, loaded.path, _chat_template(record))
    with new_folder(output) as folder:
        write_folder(source, folder, dtype, max_shard_size)
        facts = _facts(record)
        if verify:
            nats = _write_check(record, data, folder, dtype, loaded)
            facts["bound on fixed noise"] = f"{nats:.4f} nats/token, {CHECK_SAMPLES} held-out sequences"
        write_card(source, folder, dtype, facts)
        return _verify(folder) if verify else ""


def _tokenizer(record: RunRecord, path: Path | None, data: str) -> LoadedTokenizer:
    """The model's tokenizer, checked."""
    if path is None:
        shard, _ = open_held_out(record.tokenizer_fingerprint, data, record.config.data)
        path = Path(shard.manifest.tokenizer_directory)
        if not path.exists():
            raise InputError(
                f"tokenizer: {path}, where {data} was indexed with it, is not there; give --tokenizer"
            )
    tokenizer = load_tokenizer(path, known={record.tokenizer_fingerprint: record.vocabulary})
    if tokenizer.fingerprint != record.tokenizer_fingerprint:
        raise InputError(f"tokenizer: {path} is not the one the model was trained with")
    if tokenizer.library != "tokenizers":
        raise InputError(f"tokenizer: {path} is not a Hugging Face directory, which an export ships")
    return tokenizer


def _chat_template(record: RunRecord) -> str:
    """The template that the training data were written with, if they are chats and still here."""
    for prefix in record.config.data.train:
        with suppress(InputError):
            if found := read_manifest(as_path(prefix)).chat_template:
                return found
    return ""


def _source(record: RunRecord, tokenizer: Path, chat_template: str) -> ExportSource:
    from megatron_dlm.checkpointing.full_weights import FullWeights
    from megatron_dlm.conversion.to_hugging_face import ExportSource

    config, progress = record.config, read_json(record.directory / PROGRESS_RECORD)
    weights = FullWeights(record.directory, config.model, record.vocabulary.size, averaged=record.averaged)
    return ExportSource(
        read=weights.read,
        shapes=weights.shapes,
        model=config.model,
        vocabulary=record.vocabulary,
        objective=config.objective,
        tokenizer=tokenizer,
        chat_template=chat_template,
        seq_length=config.data.seq_length,
        batch_size=config.training.global_batch_size,
        steps=int(progress["step"]),
        record=read_json(record.directory / RUN_RECORD) | {"step": int(progress["step"])},
    )


def _facts(record: RunRecord) -> dict[str, str]:
    """Rows of the model card."""
    config = record.config
    return {
        "training samples": f"{read_json(record.directory / PROGRESS_RECORD)['consumed_samples']:,}",
        "training data": ", ".join(Path(prefix).name for prefix in config.data.train),
        "SHA-256 of its tokens": record.train_sha256,
        "SHA-256 of tokenizer.json": record.tokenizer_fingerprint,
        "vocabulary": f"{record.vocabulary.size:,} ids, mask {record.vocabulary.mask_token_id}",
        "precision of training": config.training.precision,
        **({"weights": f"average with decay {config.optimizer.ema_decay}"} if record.averaged else {}),
    }


def _write_check(
    record: RunRecord, data: str, folder: Path, dtype: ExportDtype, tokenizer: LoadedTokenizer
) -> float:
    """Write the trained model's outputs on a batch at fixed noise; returns its NELBO in nats per token."""
    import numpy as np
    import torch

    # Document masks are the data's, not the model's.
    _, shards = open_held_out(
        record.tokenizer_fingerprint,
        data,
        replace(record.config.data, document_mask=False, drop_long_records=True),
    )
    precision: Precision = "bf16" if dtype == "bf16" else "fp32"
    # Where the folder's own comparison computes: a GPU sums in another order, and may multiply in TF32.
    with open_checkpoint(record, ParallelConfig(device="cpu"), precision) as opened:
        from megatron_dlm.conversion.verification import write_check
        from megatron_dlm.diffusion.context import CorruptionContext
        from megatron_dlm.platform.rng import NoiseSource

        positions = np.arange(CHECK_SAMPLES, dtype=np.int64)
        context = CorruptionContext(
            noise=NoiseSource(record.config.training.seed, "export"),
            step=0,
            batch_start=0,
            global_batch_size=CHECK_SAMPLES,
            training=False,
        )
        (blocks,) = shards.rows.values()
        batch = TokenBatch(
            token_ids=torch.from_numpy(blocks.read(positions % blocks.num_rows)), sample_indices=positions
        )
        objective = record.config.objective.build(record.vocabulary)
        # Where a family has parts, one of them shows the weights as well as all.
        inputs, targets = objective.corrupt(objective.split(batch, context)[0], context)
        return write_check(
            opened.denoiser,
            record.config.objective,
            inputs,
            targets,
            folder,
            dtype,
            record.config.training.head_rows_per_chunk,
            tokenizer,
        )


def _verify(folder: Path) -> str:
    """Run the folder's own comparison in a clean process: isolated, offline, its modules cached nowhere."""
    with tempfile.TemporaryDirectory() as modules:
        finished = subprocess.run(
            [
                sys.executable,
                "-I",
                "-B",
                str(folder / "verify_megatron_dlm.py"),
                str(folder),
                "--write-report",
            ],
            env=_environment() | {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"},
            cwd=modules,
            capture_output=True,
            text=True,
            timeout=VERIFY_SECONDS,
        )
    if finished.returncode:
        lines = finished.stderr.strip().splitlines()
        raise TrainingError(
            f"export: {lines[-1] if lines else f'exit code {finished.returncode}'}; not written"
        )
    return finished.stdout


def _environment() -> dict[str, Any]:
    """This process's environment without the variables that would make a child process a distributed rank."""
    return {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }


def export_reference_checkpoint(record: RunRecord, output: Path) -> None:
    """Write one checkpoint's weights in the format of the paper's code, on one process.

    Args:
        record: run record of the checkpoint.
        output: `.ckpt` file to create.
    """
    from megatron_dlm.checkpointing.full_weights import FullWeights
    from megatron_dlm.conversion.reference import write_reference_checkpoint

    _require_one_process()
    check_new(output)
    weights = FullWeights(
        record.directory, record.config.model, record.vocabulary.size, averaged=record.averaged
    )
    step = int(read_json(record.directory / PROGRESS_RECORD)["step"])
    write_reference_checkpoint(weights.read(weights.shapes), output, record.config.model, step)


def _require_one_process() -> None:
    world_size = detect_environment().world_size
    if world_size != 1:
        raise InputError(
            f"export: started on {world_size} processes; it takes one, whatever the layout saved"
        )
