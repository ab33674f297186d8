"""Opening a checkpoint for use, and its bound on held-out data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.interfaces import InputError
from megatron_dlm.models.config import Precision
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import ParallelConfig, ParallelState, start_parallel, stop_parallel
from megatron_dlm.training.run import RunRecord, read_run_record
from megatron_dlm.training.run_config import EvaluationConfig, check_run

if TYPE_CHECKING:
    from megatron_dlm.data.loader import DataConfig
    from megatron_dlm.data.shard import Shard
    from megatron_dlm.evaluation.likelihood import Likelihood
    from megatron_dlm.models.denoiser import Denoiser
    from megatron_dlm.training.run_data import BlendedShards


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint's weights on this process, at any layout."""

    record: RunRecord
    denoiser: Denoiser
    parallel: ParallelState


@contextmanager
def open_checkpoint(
    record: RunRecord, parallel_config: ParallelConfig, precision: Precision
) -> Iterator[OpenedCheckpoint]:
    """Start the groups, load the weights; stops the groups at the end. All processes of the job enter it.

    Args:
        record: of the checkpoint.
        parallel_config: layout to load on.
        precision: of the loaded weights; fp32 has those of a bf16 run before they were rounded.

    Yields:
        The loaded stage.

    Raises:
        InputError: an interleaved or fully sharded layout.
    """
    if parallel_config.virtual_pipeline_model_parallel_size > 1:
        raise InputError("parallel.virtual_pipeline_model_parallel_size: for training only")
    if parallel_config.fully_sharded:
        raise InputError("parallel.fully_sharded: for training only")
    parallel = start_parallel(detect_environment(), parallel_config)
    from megatron_dlm.checkpointing.manager import load_weights, verify_on_all_ranks
    from megatron_dlm.training.session import build_denoiser

    verify_on_all_ranks(record.directory, parallel)
    training = replace(record.config.training, precision=precision)
    config = replace(record.config, parallel=parallel_config, training=training)
    (denoiser,) = build_denoiser(config, record.vocabulary, parallel).chunks
    denoiser.load_state_dict(load_weights(record.directory, denoiser, parallel))
    yield OpenedCheckpoint(record, denoiser.eval(), parallel)
    stop_parallel()


def evaluate_checkpoint(
    checkpoint: Path,
    data: str,
    evaluation: EvaluationConfig,
    parallel_config: ParallelConfig,
    micro_batch_size: int,
    *,
    drop_long_records: bool,
) -> tuple[Likelihood, bool]:
    """The bound of one checkpoint on one shard.

    Args:
        checkpoint: a step-NNNNNNNN directory.
        data: prefix of the held-out shard.
        evaluation: batches and their size.
        parallel_config: layout to evaluate on.
        micro_batch_size: samples of one forward pass.
        drop_long_records: leave out prompts with responses above the model's length.

    Returns:
        The estimate, and whether this process is rank 0.

    Raises:
        InputError: unusable checkpoint, shard or sizes.
    """
    record = read_run_record(checkpoint)
    training = replace(
        record.config.training, micro_batch_size=micro_batch_size, global_batch_size=evaluation.batch_size
    )
    # What the run read its batches with need not be here.
    held_out = replace(record.config.data, loader="torch", drop_long_records=drop_long_records)
    config = replace(
        record.config,
        parallel=parallel_config,
        training=training,
        evaluation=evaluation,
        data=held_out,
    )
    check_run(config, detect_environment().world_size)
    shard, shards = open_held_out(record, data, held_out)
    if shards.has_prompts:
        config.objective.check_prompts(training=False)
    with open_checkpoint(record, parallel_config, config.training.precision) as opened:
        from megatron_dlm.training.session import Validation
        from megatron_dlm.training.step import PipelineRunner

        objective = config.objective.build(record.vocabulary)
        runner = PipelineRunner(
            [opened.denoiser], objective, opened.parallel, config.training.head_rows_per_chunk
        )
        validation = Validation(runner, shards, shard.manifest.bytes_per_token, config, opened.parallel)
        return validation.run(evaluation), opened.parallel.rank == 0


def open_held_out(record: RunRecord, data: str, config: DataConfig) -> tuple[Shard, BlendedShards]:
    """The shard at `data`, which the model's tokenizer must have made, and its rows.

    Args:
        record: of the checkpoint.
        data: prefix or URL of the shard.
        config: how it is read.

    Returns:
        Both.

    Raises:
        InputError: unreadable, or made by another tokenizer.
    """
    from megatron_dlm.training.run_data import held_out_rows

    shard, shards = held_out_rows(data, config)
    if shard.manifest.tokenizer_fingerprint != record.tokenizer_fingerprint:
        raise InputError(f"data: {data} was made by another tokenizer than the data of {record.directory}")
    return shard, shards
