"""AdamW of the recipe on megatron-core's data parallel wrapper and distributed optimizer."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from megatron_dlm.models.config import Precision
from megatron_dlm.platform.gpu import sent, waiting_for_gpu
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.optimizer_config import OptimizerConfig

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch import Tensor

    from megatron_dlm.models.denoiser import ChunkedDenoiser, Denoiser


def wrap_data_parallel(denoiser: Denoiser | ChunkedDenoiser, parallel: ParallelConfig) -> list[Any]:
    """megatron-core's data parallel wrapper around each chunk of one stage, gradients in float32.

    Args:
        denoiser: initialised stage.
        parallel: tells whether the optimizer, or everything, is sharded.

    Returns:
        The wrapped chunks, one where the pipeline is not interleaved; the `module` of each is the chunk.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_dlm.models.cuda_graphs import where_recordings_may_join

    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_size or None,
        fp8_param_gather=denoiser.config.fp8_param,
        # The loop stops on losses and gradient norms that are not finite, and names the samples.
        check_for_nan_in_grad=False,
    )
    if parallel.fully_sharded:
        return [_fully_sharded(chunk, ddp_config) for chunk in denoiser.chunks]
    with where_recordings_may_join() if parallel.cuda_graphs else nullcontext():
        return [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in denoiser.chunks]


def _fully_sharded(chunk: Denoiser, ddp_config: Any) -> Any:
    from megatron_dlm.models.adaln_layer import AdaLNTransformerLayer
    from megatron_dlm.models.head import Head
    from megatron_dlm.platform.fully_sharded import FullyShardedDataParallel

    return FullyShardedDataParallel(chunk.config, ddp_config, chunk, (AdaLNTransformerLayer, Head))


def build_optimizer(
    config: OptimizerConfig, parallel: ParallelConfig, precision: Precision, chunks: list[Any]
) -> Any:
    """Build megatron-core's optimizer for the wrapped chunks of one pipeline stage.

    Args:
        config: hyperparameters of AdamW.
        parallel: selects whether optimizer state is sharded over data parallel ranks.
        precision: precision of the parameters; at any precision, fully sharded parameters are fp32 and serve
            as their own main weights.
        chunks: wrapped chunks from `wrap_data_parallel`.

    Returns:
        A `MegatronOptimizer`; its learning rate is set every step by the loop.
    """
    import torch
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer

    from megatron_dlm.platform.distributed_optimizer import keep_norms_on_device

    keeps_main_weights = precision != "fp32" and not parallel.fully_sharded
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=0.0,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
        bf16=keeps_main_weights,
        params_dtype=torch.bfloat16 if keeps_main_weights else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_recipe=chunks[0].config.fp8_recipe if chunks[0].config.fp8_param else None,
    )
    keep_norms_on_device()
    # An empty override table: megatron-core's default exempts biases and 1-D parameters from decay.
    return get_megatron_optimizer(megatron_config, chunks, config_overrides={})


def finish_gradients(
    model: list[Any],
    num_tokens: Tensor | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    **kwargs: Any,
) -> None:
    """Sum gradients over ranks and divide by the tokens of the batch; megatron-core's schedules call it.

    Same result as megatron-core's `finalize_model_grads`, which waits for the GPU before it divides, to see
    whether there are any tokens.

    Args:
        model: wrapped chunks of this pipeline stage.
        num_tokens: int [], tokens of this rank's microbatches, valid on the last stage; None: no division.
        pg_collection: process groups of this rank, passed by the schedule.
        **kwargs: passed on to megatron-core's `finalize_model_grads`.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.process_groups_config import ProcessGroupCollection

    finalize_model_grads(model, None, pg_collection=pg_collection, **kwargs)
    if num_tokens is None:
        return
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    last_stage = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
    dist.broadcast(num_tokens, src=last_stage, group=groups.pp)
    dist.all_reduce(num_tokens, group=groups.dp_cp)
    scaling = torch.where(num_tokens > 0, 1.0 / num_tokens, 1.0)
    for chunk in model:
        chunk.scale_gradients(scaling)


def step_if_finite(optimizer: Any, device: torch.device, largest_norm: float = math.inf) -> float:
    """Make an optimizer step if the gradients of the last backward pass are finite; all ranks call it.

    Args:
        optimizer: from `build_optimizer`.
        device: device of the tensors that ranks exchange.
        largest_norm: no step is made if the gradient norm is above this.

    Returns:
        Gradient norm before clipping; NaN if it is not finite on some rank, and then no parameter changes.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    norm = gradient_norm(optimizer)
    largest = _largest_of_replicas(optimizer, device, norm if math.isfinite(norm) else math.inf)
    if not math.isfinite(largest):
        return math.nan
    if largest > largest_norm:
        return largest
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    optimizer.step_with_ready_grads()
    return norm


def gradient_norm(optimizer: Any) -> float:
    """Global norm of the last backward pass's gradients, which are then ready for an optimizer step."""
    optimizer.prepare_grads()
    with waiting_for_gpu("the gradient's norm"):
        return float(optimizer.get_grad_norm())


def _largest_of_replicas(optimizer: Any, device: torch.device, norm: float) -> float:
    """Gradient norm that all ranks agree on: the maximum over replicas, since one of them may be damaged."""
    import torch
    import torch.distributed as dist

    from megatron_dlm.platform.distributed_optimizer import is_sharded

    # A sharded one's is summed over all replicas, too.
    if dist.get_world_size() == 1 or is_sharded(optimizer):
        return norm
    largest = sent(torch.tensor(norm), device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    with waiting_for_gpu("the replicas' norms"):
        return float(largest)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
