"""Checks of a run's configuration that need no process group: sizes, combinations, device and packages."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING

from megatron_dlm.data.loading.dali import require_dali
from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.families.schedules import has_parts_at_times, naming_step, objective_phases
from megatron_dlm.interfaces import InputError
from megatron_dlm.kernels.choice import wants_triton
from megatron_dlm.models.config import TransformerImpl
from megatron_dlm.platform.gpu import capability, name_of
from megatron_dlm.platform.versions import check_transformer_engine, has_transformer_engine
from megatron_dlm.run.config import RunConfig

if TYPE_CHECKING:
    import torch


def check_run(config: RunConfig, world_size: int) -> None:
    """Refuse sizes and combinations of options that cannot work.

    Args:
        config: configuration of the run.
        world_size: number of processes of the job.

    Raises:
        InputError: sizes do not divide, options do not work together, or no family is chosen.
    """
    if type(config.objective) not in OBJECTIVES.values():
        raise InputError(f"objective: choose a family, one of {', '.join(OBJECTIVES)}")
    if config.data.document_mask and not config.objective.takes_document_masks:
        raise InputError(
            f"data.document_mask: {config.objective.name} cuts samples, not documents, into blocks"
        )
    if config.data.loader == "dali":
        require_dali()
    data_size = config.parallel.data_parallel_size(world_size)
    config.model.check_parallel(config.parallel)
    seq_length = config.data.seq_length
    config.parallel.check_lengths(config.objective.length_multiple(seq_length), seq_length)
    if config.parallel.fully_sharded:
        _check_fully_sharded(config)
    if config.training.precision == "fp8":
        _check_fp8(config)
    if config.parallel.overlap_tensor_parallel:
        _check_tensor_overlap(config)
    lookahead = config.objective.training_lookahead
    if lookahead != 1:
        raise InputError(
            f"objective.lookahead: {lookahead:g}, and a trained model sees the whole text; a schedule may "
            f'begin with it: --objective.schedules "lookahead 0:{lookahead:g} 2000"'
        )
    if config.parallel.cuda_graphs:
        _check_cuda_graphs(config)
    if config.generation.every % config.checkpoint.save_every:
        raise InputError(
            f"generation.every: {config.generation.every} is not a multiple of checkpoint.save_every "
            f"{config.checkpoint.save_every}: texts are written by checkpoints"
        )
    micro = config.training.micro_batch_size
    batches = [("training.global_batch_size", size) for size in config.training.batch_sizes()]
    for name, size in [*batches, ("evaluation.batch_size", config.evaluation.batch_size)]:
        _check_sizes(config, name, size)
        if size % (micro * data_size):
            raise InputError(
                f"{name}: {size} is not a multiple of training.micro_batch_size {micro} "
                f"x data parallel size {data_size}"
            )
        stages, microbatches = config.parallel.pipeline_model_parallel_size, size // (micro * data_size)
        if config.parallel.virtual_pipeline_model_parallel_size > 1 and microbatches < stages:
            raise InputError(
                f"{name}: {size} is {microbatches} microbatches, and interleaved chunks need as many as "
                f"parallel.pipeline_model_parallel_size {stages}"
            )


def _check_sizes(config: RunConfig, name: str, size: int) -> None:
    """Refuse a global batch that the objective of evaluation, or of some training step, cannot divide."""
    objective, seq_length = config.objective, config.data.seq_length
    objective.check_sizes(size, seq_length)
    if name.startswith("training"):
        for step, phase in objective_phases(objective).items():
            with naming_step(step):
                phase.check_sizes(size, seq_length)


def is_legal(config: RunConfig, processes: int) -> bool:
    """Whether `check_run` takes a configuration on a number of processes."""
    try:
        check_run(config, processes)
    except InputError:
        return False
    return True


def _check_fully_sharded(config: RunConfig) -> None:
    if config.training.precision == "fp8":
        raise InputError("training.precision: fp8, and parallel.fully_sharded needs fp32 or bf16")
    if has_parts_at_times(config.objective):
        raise InputError(
            "parallel.fully_sharded: needs equal numbers of forwards on all ranks, which an objective of two "
            "parts (objective.alpha_0 between 0 and 1) does not give"
        )


def _check_passes_are_alike(config: RunConfig, needs: str) -> None:
    """Refuse runs whose passes differ in shape, for features set up once and used in every pass."""
    stages = config.parallel.pipeline_model_parallel_size
    if stages > 1:
        raise InputError(f"{needs} parallel.pipeline_model_parallel_size 1, not {stages}")
    objective, seq_length = config.objective, config.data.seq_length
    if has_parts_at_times(objective) or objective.length_multiple(seq_length) != seq_length:
        raise InputError(f"{needs} microbatches of one length, which {objective.name} here has not")


def _check_tensor_overlap(config: RunConfig) -> None:
    training, fp8, needs = config.training, config.fp8, "parallel.overlap_tensor_parallel: True needs"
    if training.precision == "fp32":
        raise InputError(f"{needs} training.precision bf16 or fp8, not fp32")
    if training.precision == "fp8" and fp8.recipe not in ("tensorwise", "delayed"):
        raise InputError(f"{needs} fp8.recipe tensorwise or delayed, not {fp8.recipe}")
    if training.precision == "fp8" and fp8.has_bf16_layers:
        raise InputError(
            f"{needs} all layers in FP8; fp8.layers_at_start_in_bf16 or ..._at_end_... is above 0"
        )
    _check_passes_are_alike(config, needs)


def _check_cuda_graphs(config: RunConfig) -> None:
    training, needs = config.training, "parallel.cuda_graphs: True needs"
    if config.parallel.fully_sharded:
        raise InputError(f"{needs} parallel.fully_sharded False")
    if training.precision == "fp8":
        raise InputError(f"{needs} training.precision fp32 or bf16, not fp8")
    if training.recompute != "none":
        raise InputError(f"{needs} training.recompute none, not {training.recompute}")
    if config.data.document_mask:
        raise InputError(f"{needs} data.document_mask False: each microbatch has a mask of its own")
    if any(phase.training_lookahead != 1 for phase in objective_phases(config.objective).values()):
        raise InputError(f"{needs} no schedule of objective.lookahead, which changes the mask")
    if training.masked_attention == "flex":
        raise InputError(f"{needs} training.masked_attention auto or dense, not flex")
    if config.data.loader == "dali":
        raise InputError(
            f"{needs} data.loader torch or pinned: DALI's threads may not work while layers are recorded"
        )
    _check_passes_are_alike(config, needs)


def check_device(config: RunConfig, device: torch.device) -> None:
    """Refuse options that the device of a run does not support.

    Args:
        config: configuration of the run.
        device: device of this process.

    Raises:
        InputError: CUDA graphs, energy or memory snapshots are requested on a CPU, or an option that needs
            Transformer Engine without it, or `wants_triton`, `wants_flex_attention` or `transformer_impl`
            refuses the configuration.
    """
    if config.parallel.cuda_graphs and device.type != "cuda":
        raise InputError("parallel.cuda_graphs: True, and this run is on a CPU")
    for name in ("memory_snapshot", "energy"):
        if getattr(config.telemetry, name) and device.type != "cuda":
            raise InputError(f"telemetry.{name}: True, and this run is on a CPU")
    if config.telemetry.energy and importlib.util.find_spec("pynvml") is None:
        raise InputError("telemetry.energy: True, and it needs NVML: pip install nvidia-ml-py")
    has_triton = wants_triton(config.training.kernels, device)
    wants_flex_attention(config, device, has_triton=has_triton)
    is_fp8, implementation = config.training.precision == "fp8", transformer_impl(config, device)
    if is_fp8 and config.fp8.weights and implementation == "local":
        raise InputError("fp8.weights: True, and FP8 is emulated here; they are Transformer Engine's")
    if config.parallel.overlap_tensor_parallel and implementation == "local":
        asked = config.training.transformer_impl
        why = "is local" if asked == "local" else "found no Transformer Engine, or no CUDA"
        raise InputError(f"parallel.overlap_tensor_parallel: True, and training.transformer_impl {why}")


def _check_fp8(config: RunConfig) -> None:
    model, parallel, training = config.model, config.parallel, config.training
    if config.fp8.weights and not parallel.use_distributed_optimizer:
        raise InputError("fp8.weights: True, and parallel.use_distributed_optimizer is False")
    tensor = parallel.tensor_model_parallel_size
    rows = training.micro_batch_size * config.objective.length_multiple(config.data.seq_length)
    ranks = parallel.context_parallel_size * (tensor if parallel.sequence_parallel else 1)
    width = model.padded_heads(tensor) // tensor * model.head_dim
    config.fp8.check_shapes(
        {
            "model.hidden_size": model.hidden_size,
            "model.ffn_hidden_size of a tensor parallel rank": model.ffn_hidden_size // tensor,
            "the width of a tensor parallel rank's heads": width,
            _positions(config, ranks): rows // ranks,
        }
    )
    config.fp8.check_layers(model.stage_layers(parallel.pipeline_model_parallel_size))


def _positions(config: RunConfig, ranks: int) -> str:
    """Name of the number of positions in a microbatch on one of `ranks`, with what makes it a multiple."""
    multiple = config.fp8.multiple * ranks
    needed = multiple // math.gcd(multiple, config.training.micro_batch_size)
    option = "data.seq-length" if config.data.seq_length % needed else "objective.ssl-multiple"
    return f"the positions of a microbatch on a rank (--{option} has to be a multiple of {needed})"


def transformer_impl(config: RunConfig, device: torch.device) -> TransformerImpl:
    """Implementation of linear layers and attention that a run uses.

    Args:
        config: configuration of the run.
        device: device of the run.

    Returns:
        The configured implementation; for auto, the choice by device and installed packages.

    Raises:
        InputError: Transformer Engine is requested, or needed for FP8 on CUDA, but is missing, of an
            unsupported version or without its PyTorch part; or the GPU has no FP8 of this recipe.
    """
    asked, precision = config.training.transformer_impl, config.training.precision
    # On a CPU nothing of it may be imported, see platform/cpu.py.
    present = device.type == "cuda" and has_transformer_engine()
    if asked == "transformer_engine" and not present:
        raise InputError("training.transformer_impl: transformer_engine needs CUDA and megatron-dlm[gpu]")
    if asked == "auto" and precision == "fp8" and device.type == "cuda" and not present:
        raise InputError(
            "training.precision: fp8 on CUDA needs Transformer Engine, megatron-dlm[gpu]; "
            "--training.transformer-impl local emulates it, without its speed"
        )
    if asked == "local" or not present:
        return "local"
    check_transformer_engine()
    if precision == "fp8":
        config.fp8.check_capability(capability(device), name_of(device))
    return "transformer_engine"


def wants_flex_attention(config: RunConfig, device: torch.device, *, has_triton: bool) -> bool:
    """Whether attention masks are applied by FlexAttention, as tables of blocks.

    Args:
        config: configuration of the run.
        device: device of the run.
        has_triton: whether the run computes with Triton's kernels.

    Returns:
        The configured choice; for auto, True on CUDA with Triton kernels and without CUDA graphs.

    Raises:
        InputError: flex is requested on a CPU, where FlexAttention has no gradient, or on a GPU that it
            cannot be compiled for.
    """
    asked = config.training.masked_attention
    if asked == "flex" and device.type != "cuda":
        raise InputError("training.masked_attention: flex needs CUDA: FlexAttention has no gradient on a CPU")
    if asked == "flex" and not (has_triton or wants_triton("auto", device)):
        raise InputError("training.masked_attention: flex needs Triton and a GPU that it compiles for")
    if asked != "auto":
        return asked == "flex"
    return device.type == "cuda" and has_triton and not config.parallel.cuda_graphs
