"""AdamW of the recipe on megatron-core's data parallel wrapper and distributed optimizer."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_dlm.interfaces import InputError
from megatron_dlm.models.config import Precision
from megatron_dlm.platform.parallel_config import ParallelConfig

if TYPE_CHECKING:
    from megatron_dlm.models.denoiser import ChunkedDenoiser, Denoiser


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as in arXiv:2602.15014."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled decay of ALL parameters: norms, biases and embeddings too."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0 leaves it as it is."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optimizer.{name}: {getattr(self, name)} is outside [0, 1)")
        for name in ("weight_decay", "clip_grad", "epsilon"):
            if not getattr(self, name) >= 0:
                raise InputError(f"optimizer.{name}: {getattr(self, name)} is not 0 or above")


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

    return FullyShardedDataParallel(
        chunk.config, ddp_config, chunk, sub_modules_to_wrap={AdaLNTransformerLayer, Head}
    )


def build_optimizer(
    config: OptimizerConfig, parallel: ParallelConfig, precision: Precision, chunks: list[Any]
) -> Any:
    """megatron-core's optimizer over the wrapped stage.

    Args:
        config: AdamW.
        parallel: tells whether optimizer state is sharded over data parallel ranks.
        precision: of the parameters.
        chunks: from `wrap_data_parallel`.

    Returns:
        A `MegatronOptimizer`; its learning rate is set every step by the loop.
    """
    import torch
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer

    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=0.0,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
        bf16=precision != "fp32",
        params_dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_recipe=chunks[0].config.fp8_recipe if chunks[0].config.fp8_param else None,
    )
    # An empty override table: megatron-core's default exempts biases and 1-D parameters from decay.
    return get_megatron_optimizer(megatron_config, chunks, config_overrides={})


def step_if_finite(optimizer: Any, largest_norm: float = math.inf) -> float:
    """One step with the gradients of the last pass; all ranks call it.

    Args:
        optimizer: from `build_optimizer`.
        largest_norm: gradients above it change nothing.

    Returns:
        The gradient's norm before clipping; NaN where some rank's is not finite: nothing has changed then.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    norm = gradient_norm(optimizer)
    # Without the distributed optimizer each replica has a norm of its own, and one may be damaged.
    largest = torch.tensor(norm if math.isfinite(norm) else math.inf, device=torch.cuda.current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    if not torch.isfinite(largest):
        return math.nan
    if largest > largest_norm:
        return float(largest)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    optimizer.step_with_ready_grads()
    return norm


def gradient_norm(optimizer: Any) -> float:
    """Norm of the last pass's gradients over all ranks, which then wait for a step."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
