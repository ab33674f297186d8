"""This process's device, groups and place on the parallel axes."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from megatron_dlm.interfaces import InputError, TrainingError
from megatron_dlm.platform.gpu import (
    gpu_files,
    is_container,
    own_cuda,
    own_gpu,
    refuse_shared_gpus,
    start_cuda,
    why_no_cuda,
)
from megatron_dlm.platform.launch import ProcessEnvironment
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.platform.rendezvous import start_process_group
from megatron_dlm.platform.versions import check_megatron_core, import_transformer_engine

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ParallelState:
    """This process's ranks and groups, after everything has started."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    tensor_group: ProcessGroup
    pipeline_rank: int
    pipeline_size: int
    pipeline_group: ProcessGroup
    data_rank: int
    data_size: int
    data_group: ProcessGroup
    context_rank: int
    context_size: int
    replica_group: ProcessGroup
    """All that hold the same weights: data x context parallel ranks."""
    stage_group: ProcessGroup
    """All that hold parts of the same layers: tensor x data x context parallel ranks."""
    device: torch.device
    vocabulary_multiple: int = 1
    """What divides the columns of embedding and head that a tensor parallel rank holds."""

    @property
    def is_first_stage(self) -> bool:
        """Holds the token embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the final layer and the head."""
        return self.pipeline_rank == self.pipeline_size - 1


def prepare_device(environment: ProcessEnvironment, config: ParallelConfig) -> torch.device:
    """Choose the device, make megatron-core importable on it, pin the thread count.

    Must run before anything imports megatron-core.

    Args:
        environment: from `launch.detect_environment`.
        config: names the device and the threads.

    Returns:
        The CUDA device of this local rank (the only visible one where a launcher shows one each), or cpu.

    Raises:
        InputError: CUDA is asked for and cannot be used, the machine has GPUs that do not work, or this local
            rank is beyond the several devices visible.
    """
    import torch

    if not config.fully_sharded:
        # One queue to the GPU keeps megatron-core's overlapped collectives in order; it warns where unset.
        # FSDP2's all-gathers must not queue behind the computation.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.set_num_threads(config.intra_op_threads)
    if config.deterministic:
        # cuBLAS and Transformer Engine read these when they start.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
        torch.use_deterministic_algorithms(True)
    silence_megatron()
    if config.device != "cpu" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count > 1 and environment.local_rank >= count:
            raise InputError(
                f"parallel.device: {environment.local_world_size} processes on a machine with {count} devices"
            )
        device = own_cuda(environment.local_rank)
        start_cuda(device)
        import_transformer_engine()
        return device
    if config.device != "cpu":
        reason, is_unexpected = why_no_cuda()
        if config.device == "cuda":
            raise InputError(f"parallel.device: cuda is asked for and cannot be used: {reason}")
        if is_unexpected:
            raise InputError(
                f"parallel.device: auto; CUDA cannot be used: {reason}; --parallel.device cpu does without"
            )
        # Where someone may have expected a GPU.
        expected = gpu_files() or (is_container() and torch.version.cuda is not None)
        if expected and environment.rank == 0:
            logger.warning(f"parallel.device: auto takes the CPU: {reason}")
    from megatron_dlm.platform import cpu

    cpu.install()
    return torch.device("cpu")


def silence_megatron() -> None:
    """Drop warnings that tell a user nothing: absent GPU extras, and internals of megatron-core and torch."""
    for message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        "The .grad attribute of a Tensor that is not a leaf Tensor",
        "`load_state_dict` is deprecated",
        "Please use DTensor instead",
        "`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
        # The conditioning vector, which nothing changes in place.
        r"FSDP2-wrapped module \(FSDPAdaLNTransformerLayer\) returned a view tensor",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    # 0.19 lays the shards out itself, as 0.16 does, and says each time that callers might.
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
    # On a CPU one generator plays both, so saving and restoring "CUDA's" changes the other.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def start_parallel(environment: ProcessEnvironment, config: ParallelConfig) -> ParallelState:
    """Start the default process group and megatron-core's groups; all ranks call it once.

    Args:
        environment: from `launch.detect_environment`.
        config: sizes of the axes; checked against the world size first.

    Returns:
        This process's place.

    Raises:
        InputError: the axes do not fit the world, the device cannot be used, or megatron-core is another
            version.
    """
    config.data_parallel_size(environment.world_size)
    device = prepare_device(environment, config)
    check_megatron_core(on_gpu=device.type == "cuda" and environment.rank == 0)
    start_process_group(
        environment,
        backend="nccl" if device.type == "cuda" else "gloo",
        timeout_seconds=config.collective_timeout_seconds,
    )
    if device.type == "cuda":
        refuse_shared_gpus(environment.rank, environment.world_size, own_gpu(device))
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    chunks = config.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        # Its groups would otherwise wait 30 minutes, whatever the default group does.
        distributed_timeout_minutes=config.collective_timeout_seconds / 60,
    )
    # Nothing is drawn from it, but sequence parallel layers and recomputation save and restore its state.
    model_parallel_cuda_manual_seed(0)
    return ParallelState(
        rank=environment.rank,
        world_size=environment.world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        data_group=parallel_state.get_data_parallel_group(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        stage_group=parallel_state.get_amax_reduction_group(with_context_parallel=True),
        device=device,
        vocabulary_multiple=config.vocabulary_multiple(device.type),
    )


T = TypeVar("T")


def on_first_rank(state: ParallelState, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give its result to all ranks; all ranks call it.

    Args:
        state: ranks and process groups of this process.
        action: function to run on rank 0 only; its result must be picklable.

    Returns:
        The result of `action`, on every rank.

    Raises:
        InputError: `action` raised it on rank 0; raised on every rank, so that no rank waits for rank 0.
        TrainingError: `action` raised it on rank 0; raised on every rank.
        RuntimeError: on ranks other than 0, with the message of any other exception of rank 0.
    """
    import torch.distributed as dist

    outcome: list[object] = [None]
    failure: Exception | None = None
    if state.rank == 0:
        try:
            outcome = [action()]
        except (InputError, TrainingError) as error:
            failure = error
            outcome = [error]
        except Exception as error:
            failure = error
            outcome = [RuntimeError(f"rank 0: {error}")]
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def stop_parallel() -> None:
    """End megatron-core's groups and the default group, after all ranks have arrived."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
