"""The model that a run's configuration describes."""

from __future__ import annotations

from megatron_dlm.interfaces import Vocabulary
from megatron_dlm.kernels.choice import wants_triton
from megatron_dlm.models.denoiser import ChunkedDenoiser, Denoiser
from megatron_dlm.models.denoiser_config import denoiser_config
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.validation import transformer_impl, wants_flex_attention


def build_denoiser(
    config: RunConfig, vocabulary: Vocabulary, parallel: ParallelState
) -> Denoiser | ChunkedDenoiser:
    """Build this process's pipeline stage, with uninitialised weights.

    Args:
        config: configuration of the run.
        vocabulary: vocabulary of the data.
        parallel: rank and process groups of this process.

    Returns:
        The pipeline stage; a `ChunkedDenoiser` if the pipeline is interleaved.
    """
    training = config.training
    has_triton = wants_triton(training.kernels, parallel.device)
    megatron_config = denoiser_config(
        config.model,
        config.parallel,
        training.precision,
        training.recompute,
        fused_kernels=has_triton,
        transformer_impl=transformer_impl(config, parallel.device),
        fp8=config.fp8,
        flex_attention=wants_flex_attention(config, parallel.device, has_triton=has_triton),
    )
    chunks = [
        Denoiser(config.model, megatron_config, vocabulary, config.objective.attention, parallel, index)
        for index in range(config.parallel.virtual_pipeline_model_parallel_size)
    ]
    return chunks[0] if len(chunks) == 1 else ChunkedDenoiser(chunks)
