"""Every layout that a run could have on a number of GPUs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from megatron_dlm.interfaces import InputError
from megatron_dlm.models.config import Precision, Recompute
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.description import options_between
from megatron_dlm.run.validation import check_run, is_legal

RECOMPUTES: tuple[Recompute, ...] = ("none", "norms", "selective", "full")
LARGEST_CONTEXT = 8
"""Context parallel sizes above this are for sequences far longer than any published diffusion model's."""
LARGEST_MICRO_BATCH = 64
CHUNKS = (1, 2, 4)
"""Chunks of layers per pipeline stage."""


def sharding_of(run: RunConfig) -> str:
    """What data parallel ranks share."""
    if run.parallel.fully_sharded:
        return "everything"
    return "optimizer" if run.parallel.use_distributed_optimizer else "nothing"


AXES: dict[str, Callable[[RunConfig], object]] = {
    "tensor parallel": lambda run: run.parallel.tensor_model_parallel_size,
    "pipeline parallel": lambda run: run.parallel.pipeline_model_parallel_size,
    "pipeline chunks": lambda run: run.parallel.virtual_pipeline_model_parallel_size,
    "context parallel": lambda run: run.parallel.context_parallel_size,
    "microbatch": lambda run: run.training.micro_batch_size,
    "recompute": lambda run: run.training.recompute,
    "sharding": sharding_of,
    "precision": lambda run: run.training.precision,
}
"""What a layout chooses, by name."""


def legal_layouts(
    config: RunConfig, processes: int, gpus_per_node: int, precisions: Sequence[Precision]
) -> Iterator[RunConfig]:
    """The run in every layout that `check_run` accepts.

    Gradients and weights travel while the GPUs compute where that is possible. Tensor parallelism stays
    within a node and brings sequence parallelism with it where the family's lengths allow.

    Args:
        config: the run; what is no question of layout stays as it is.
        processes: GPUs of the job.
        gpus_per_node: GPUs that are linked with each other.
        precisions: precisions to try.

    Yields:
        Configurations that differ from `config` in parallel sizes, microbatch, recomputation, sharding and
        precision.
    """
    for tensor, pipeline, context in itertools.product(
        _powers_of_two(gpus_per_node), _divisors(processes), _powers_of_two(LARGEST_CONTEXT)
    ):
        if processes % (tensor * pipeline * context) or pipeline > config.model.num_layers:
            continue
        data = processes // (tensor * pipeline * context)
        for chunks, micro, recompute, precision, is_fully_sharded in itertools.product(
            CHUNKS, _powers_of_two(LARGEST_MICRO_BATCH), RECOMPUTES, precisions, (False, True)
        ):
            if config.training.global_batch_size % (micro * data) or (chunks > 1 and pipeline == 1):
                continue
            if is_fully_sharded and (data * context == 1 or pipeline > 1):
                continue
            is_shared = data * context > 1 and not is_fully_sharded
            layout = replace(
                config.parallel,
                tensor_model_parallel_size=1,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=chunks,
                context_parallel_size=context,
                sequence_parallel=False,
                use_distributed_optimizer=not is_fully_sharded,
                fully_sharded=is_fully_sharded,
                overlap_grad_reduce=is_shared,
                overlap_param_gather=is_shared,
                overlap_tensor_parallel=False,
                bucket_size=0,
            )
            training = replace(
                config.training, micro_batch_size=micro, recompute=recompute, precision=precision
            )
            for sequence in (True, False) if tensor > 1 else (False,):
                parallel = replace(layout, tensor_model_parallel_size=tensor, sequence_parallel=sequence)
                candidate = replace(config, parallel=parallel, training=training)
                if is_legal(candidate, processes):
                    yield candidate
                    break


def why_not(config: RunConfig, processes: int, axis: str) -> str | None:
    """Why the recipe cannot be shared by two ranks of an axis.

    Args:
        config: the run.
        processes: GPUs of the job.
        axis: "tensor", "pipeline" or "context".

    Returns:
        The error; None if it can.
    """
    sizes = {f"{name}_parallel_size": 1 for name in ("tensor_model", "pipeline_model", "context")}
    sizes[{"tensor": "tensor_model", "pipeline": "pipeline_model"}.get(axis, axis) + "_parallel_size"] = 2
    layout = replace(
        config.parallel,
        virtual_pipeline_model_parallel_size=1,
        sequence_parallel=False,
        overlap_tensor_parallel=False,
        **sizes,  # type: ignore[arg-type]
    )
    try:
        check_run(replace(config, parallel=layout), processes)
    except InputError as error:
        return str(error)
    return None


def changes_between(old: RunConfig, new: RunConfig) -> dict[str, str]:
    """Command-line options that turn the layout of one run into another's.

    Args:
        old: the run as it is.
        new: the same run in another layout.

    Returns:
        Values by option.
    """
    return {
        option: " ".join(values)
        for option, values in options_between(old, new).items()
        if option.startswith(("--parallel.", "--training."))
    }


def _powers_of_two(largest: int) -> list[int]:
    return [1 << exponent for exponent in range(largest.bit_length())]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
