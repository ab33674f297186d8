"""NELBO of a checkpoint or an exported model on held-out data."""

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
    """NELBO of one checkpoint on one held-out shard.

    Args:
        record: run record of the checkpoint.
        data: prefix of the held-out shard.
        config: number of sequences and of noisy copies.
        parallel_config: parallel layout to evaluate on.
        micro_batch_size: noisy copies per forward pass.
        drop_long_records: leave out prompt-response records longer than the model's sequence length.
        progress: callback with the sequences done and in total, called on rank 0.

    Returns:
        The estimate, and whether this process is rank 0.

    Raises:
        InputError: unusable checkpoint, shard or sizes.
    """
    shard, rows, run_config = held_out(record.config, record.tokenizer_fingerprint, data, drop_long_records)
    run_config = scoring_config(run_config, config, parallel_config)
    with open_checkpoint(record, parallel_config, run_config.training.precision) as opened:
        from megatron_dlm.evaluation.nelbo import RankShare, held_out_bound

        parallel = opened.parallel
        bound = held_out_bound(
            copies_by(opened.denoiser, run_config, parallel),
            rows,
            run_config.objective,
            record.vocabulary,
            config,
            bytes_per_token=shard.manifest.bytes_per_token,
            share=RankShare(micro_batch_size, parallel.data_rank, parallel.data_size),
            progress=progress if parallel.rank == 0 else lambda done, total: None,
        )
        return bound, parallel.rank == 0


def copies_by(denoiser: Denoiser, config: RunConfig, parallel: ParallelState) -> RunCopies:
    """Build the function that scores noisy copies with a loaded model.

    Args:
        denoiser: this process's pipeline stage of the model.
        config: configuration from `scoring_config`.
        parallel: this process's ranks in the parallel layout.

    Returns:
        Function that scores the noisy copies of a global batch.
    """
    from megatron_dlm.evaluation.nelbo import megatron_copies
    from megatron_dlm.execution.pipeline_runner import PipelineRunner

    def runner_of(objective: Objective) -> PipelineRunner:
        return PipelineRunner([denoiser], objective, parallel, config.training.head_rows_per_chunk)

    return megatron_copies(runner_of, denoiser.vocabulary)


def scoring_config(run_config: RunConfig, config: BoundConfig, parallel_config: ParallelConfig) -> RunConfig:
    """Adapt a run's configuration to scoring noisy copies of sequences, and check it.

    Args:
        run_config: configuration of the run.
        config: number of noisy copies.
        parallel_config: parallel layout to score on.

    Returns:
        Configuration whose global batch is the noisy copies of one sequence.

    Raises:
        InputError: the sizes do not fit the layout.
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
    """NELBO of an exported model on one held-out shard; processes that share it each score a part.

    Args:
        loaded: exported model.
        data: prefix of the held-out shard.
        config: number of sequences and of noisy copies.
        micro_batch_size: noisy copies per forward pass.
        drop_long_records: leave out prompt-response records longer than the model's sequence length.
        progress: callback with the sequences done and in total.

    Returns:
        The estimate.

    Raises:
        InputError: unusable shard or sizes.
    """
    from megatron_dlm.evaluation.exported_scoring import ExportedBounds
    from megatron_dlm.evaluation.nelbo import RankShare, exported_copies, held_out_bound

    shard, rows, run_config = held_out(loaded.config, loaded.tokenizer.fingerprint, data, drop_long_records)
    score = ExportedBounds(
        loaded.model,
        loaded.vocabulary,
        run_config.objective.attention,
        run_config.training.head_rows_per_chunk,
    )
    return held_out_bound(
        exported_copies(score, loaded.vocabulary, loaded.peers),
        rows,
        run_config.objective,
        loaded.vocabulary,
        config,
        bytes_per_token=shard.manifest.bytes_per_token,
        share=RankShare(micro_batch_size, loaded.peers.rank, loaded.peers.world_size),
        progress=progress,
    )


def held_out(
    config: RunConfig, fingerprint: str, data: str, drop_long_records: bool
) -> tuple[Shard, Rows, RunConfig]:
    """Open a held-out shard.

    Args:
        config: configuration of the run whose model is scored.
        fingerprint: SHA-256 of the model's tokenizer.
        data: prefix or URL of the held-out shard.
        drop_long_records: leave out prompt-response records longer than the model's sequence length.

    Returns:
        The shard, its rows, and the run configuration to read them with.

    Raises:
        InputError: the shard cannot be used.
    """
    # What the run read its batches with need not be here.
    held_out = replace(config.data, loader="torch", drop_long_records=drop_long_records)
    shard, shards = open_held_out(fingerprint, data, held_out)
    if shards.has_prompts:
        config.objective.check_prompts(training=False)
    (rows,) = shards.rows.values()
    return shard, rows, replace(config, data=held_out)
