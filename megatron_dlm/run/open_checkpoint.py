"""Opening a checkpoint for evaluation or export, at any layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_dlm.interfaces import InputError
from megatron_dlm.models.config import Precision
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import ParallelState, start_parallel, stop_parallel
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.run_record import RunRecord

if TYPE_CHECKING:
    import torch

    from megatron_dlm.models.denoiser import Denoiser


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
    """Start the process groups, load the weights, and stop the groups on exit; all ranks must enter it.

    Args:
        record: run record of the checkpoint.
        parallel_config: parallel layout to load the weights at.
        precision: precision of the loaded weights; fp32 gives a bf16 run's main weights, before rounding.

    Yields:
        This rank's pipeline stage, with loaded weights.

    Raises:
        InputError: the layout is interleaved or fully sharded, or uses CUDA graphs or overlap.
    """
    refuse_training_layouts(parallel_config)
    parallel = start_parallel(detect_environment(), parallel_config)
    config = evaluation_config(record.config, parallel_config, precision, parallel.device)
    yield OpenedCheckpoint(record, load_denoiser(record, config, parallel), parallel)
    stop_parallel()


def evaluation_config(
    config: RunConfig, parallel_config: ParallelConfig, precision: Precision, device: torch.device
) -> RunConfig:
    """Configuration to evaluate a run with; on a CPU without what only a GPU has.

    Args:
        config: configuration of the run.
        parallel_config: parallel layout of the evaluation.
        precision: precision of the evaluation.
        device: device of the evaluation.

    Returns:
        The run's configuration with these settings.
    """
    training = replace(config.training, precision=precision)
    if device.type == "cpu":
        training = replace(training, transformer_impl="auto", kernels="auto", masked_attention="auto")
    return replace(config, parallel=parallel_config, training=training)


def refuse_training_layouts(parallel_config: ParallelConfig) -> None:
    """Refuse parallel layouts that only training supports.

    Args:
        parallel_config: parallel layout of an evaluation or export.

    Raises:
        InputError: the layout is interleaved or fully sharded, or uses CUDA graphs or overlap.
    """
    for name in (
        "virtual_pipeline_model_parallel_size",
        "fully_sharded",
        "cuda_graphs",
        "overlap_grad_reduce",
        "overlap_param_gather",
        "overlap_tensor_parallel",
    ):
        if getattr(parallel_config, name) != getattr(ParallelConfig, name):
            raise InputError(f"parallel.{name}: for training only")


def load_denoiser(record: RunRecord, config: RunConfig, parallel: ParallelState) -> Denoiser:
    """Load this rank's pipeline stage of a checkpoint's model, for evaluation; all ranks call it.

    Args:
        record: run record of the checkpoint.
        config: configuration of the run that wrote it, with the layout and the precision to load.
        parallel: rank and process groups of this process.

    Returns:
        The loaded stage.

    Raises:
        InputError: the checkpoint is damaged.
    """
    from megatron_dlm.checkpointing.manager import load_weights, verify_on_all_ranks
    from megatron_dlm.run.model import build_denoiser

    verify_on_all_ranks(record.directory, parallel)
    (denoiser,) = build_denoiser(config, record.vocabulary, parallel).chunks
    # Buffers may be missing; parameters are all there.
    weights = load_weights(record.directory, denoiser, parallel, averaged=record.averaged)
    denoiser.load_state_dict(weights, strict=False)
    return denoiser.eval()
