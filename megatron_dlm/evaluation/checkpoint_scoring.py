"""Opening a checkpoint for use, and its bound on held-out data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.datasets import open_held_out
from megatron_dlm.run.open_checkpoint import open_checkpoint
from megatron_dlm.run.run_record import RunRecord
from megatron_dlm.run.validation import check_run

if TYPE_CHECKING:
    from megatron_dlm.data.loading.packing import Rows
    from megatron_dlm.data.shards.shard import Shard
    from megatron_dlm.evaluation.loaded_model import LoadedModel
    from megatron_dlm.evaluation.nelbo import ProgressCallback, RunCopies
    from megatron_dlm.evaluation.nelbo_statistics import Bound, BoundConfig
    from megatron_dlm.families.base import Objective
    from megatron_dlm.models.denoiser import Denoiser


def bound_of_checkpoint(
    record: RunRecord,
    data: str,
    config: BoundConfig,
    parallel_config: ParallelConfig,
    micro_batch_size: int,
    *,
    drop_long_records: bool,
    progress: ProgressCallback,
) -> tuple[Bound, bool]:
    """The bound of one checkpoint on one shard.

    Args:
        record: of the checkpoint.
        data: prefix of the held-out shard.
        config: how much of it, and how much noise.
        parallel_config: layout to evaluate on.
        micro_batch_size: copies of one forward pass.
        drop_long_records: leave out prompts with responses above the model's length.
        progress: told of sequences done and in all, on rank 0.

    Returns:
        The estimate, and whether this process is rank 0.

    Raises:
        InputError: unusable checkpoint, shard or sizes.
    """
    shard, rows, run_config = held_out(record.config, record.tokenizer_fingerprint, data, drop_long_records)
    run_config = scoring_config(run_config, config, parallel_config)
    with open_checkpoint(record, parallel_config, run_config.training.precision) as opened:
        from megatron_dlm.evaluation.nelbo import held_out_bound, share_of_rank

        parallel = opened.parallel
        bound = held_out_bound(
            copies_by(opened.denoiser, run_config, parallel),
            rows,
            run_config.objective,
            record.vocabulary,
            config,
            bytes_per_token=shard.manifest.bytes_per_token,
            share=share_of_rank(micro_batch_size, parallel.data_rank, parallel.data_size),
            progress=progress if parallel.rank == 0 else lambda done, total: None,
        )
        return bound, parallel.rank == 0


def copies_by(denoiser: Denoiser, config: RunConfig, parallel: ParallelState) -> RunCopies:
    """Scores noisy copies by a loaded model.

    Args:
        denoiser: this process's stage.
        config: of `scoring_config`.
        parallel: this process's place.

    Returns:
        The function.
    """
    from megatron_dlm.evaluation.nelbo import megatron_copies
    from megatron_dlm.execution.pipeline_runner import PipelineRunner

    def runner_of(objective: Objective) -> PipelineRunner:
        return PipelineRunner([denoiser], objective, parallel, config.training.head_rows_per_chunk)

    return megatron_copies(runner_of, denoiser.vocabulary)


def scoring_config(run_config: RunConfig, config: BoundConfig, parallel_config: ParallelConfig) -> RunConfig:
    """A run's configuration for scoring copies of sequences, checked.

    Args:
        run_config: of the run.
        config: how many copies.
        parallel_config: layout to score on.

    Returns:
        With global batches of a sequence's copies.

    Raises:
        InputError: sizes that do not divide.
    """
    scoring = replace(
        run_config,
        parallel=parallel_config,
        training=replace(
            run_config.training,
            micro_batch_size=1,
            global_batch_size=config.num_times,
            ramp_start=0,
            ramp_increment=0,
            ramp_samples=0,
        ),
        evaluation=replace(run_config.evaluation, batch_size=config.num_times),
    )
    check_run(scoring, detect_environment().world_size)
    return scoring


def bound_of_folder(
    loaded: LoadedModel,
    data: str,
    config: BoundConfig,
    micro_batch_size: int,
    *,
    drop_long_records: bool,
    progress: ProgressCallback,
) -> Bound:
    """The bound of an exported model on one shard, on one process without groups.

    Args:
        loaded: the model.
        data: prefix of the held-out shard.
        config: how much of it, and how much noise.
        micro_batch_size: copies of one forward pass.
        drop_long_records: leave out prompts with responses above the model's length.
        progress: told of sequences done and in all.

    Returns:
        The estimate.

    Raises:
        InputError: unusable shard or sizes.
    """
    from megatron_dlm.evaluation.exported_scoring import ExportedBounds
    from megatron_dlm.evaluation.nelbo import exported_copies, held_out_bound, share_of_rank

    shard, rows, run_config = held_out(loaded.config, loaded.tokenizer.fingerprint, data, drop_long_records)
    score = ExportedBounds(
        loaded.model,
        loaded.vocabulary,
        run_config.objective.attention,
        run_config.training.head_rows_per_chunk,
    )
    return held_out_bound(
        exported_copies(score, loaded.vocabulary),
        rows,
        run_config.objective,
        loaded.vocabulary,
        config,
        bytes_per_token=shard.manifest.bytes_per_token,
        share=share_of_rank(micro_batch_size),
        progress=progress,
    )


def held_out(
    config: RunConfig, fingerprint: str, data: str, drop_long_records: bool
) -> tuple[Shard, Rows, RunConfig]:
    """The shard, its rows, and the configuration to read them with.

    Args:
        config: of the run whose model is scored.
        fingerprint: of the model's tokenizer.
        data: prefix or URL of the shard.
        drop_long_records: leave out prompts with responses above the model's length.

    Returns:
        All three.

    Raises:
        InputError: an unusable shard.
    """
    # What the run read its batches with need not be here.
    held_out = replace(config.data, loader="torch", drop_long_records=drop_long_records)
    shard, shards = open_held_out(fingerprint, data, held_out)
    if shards.has_prompts:
        config.objective.check_prompts(training=False)
    (rows,) = shards.rows.values()
    return shard, rows, replace(config, data=held_out)
