"""Sizes of the parallel axes, and this process's place in them."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from megatron_dlm.interfaces import InputError, TrainingError
from megatron_dlm.platform.launch import ProcessEnvironment, start_process_group

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is spread over processes; the rest of the world is data parallel."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's weights."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages; the first ones take a layer more where layers do not divide."""
    virtual_pipeline_model_parallel_size: int = 1
    """Chunks of layers that each pipeline stage holds, run in turn with the other stages' (interleaved)."""
    context_parallel_size: int = 1
    """Processes that share each sequence; lengths must be multiples of twice this."""
    sequence_parallel: bool = False
    """Cut what tensor parallelism would replicate, norms and the residual stream, along the sequence."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data parallel ranks while earlier layers' are still being made."""
    overlap_param_gather: bool = False
    """Gather the weights that the distributed optimizer has changed while earlier layers of the next forward
    pass are under way; needs overlap_grad_reduce."""
    overlap_tensor_parallel: bool = False
    """Pass what tensor parallel ranks exchange in pieces while matrix products are under way; Transformer
    Engine's user buffers, on CUDA with sequence_parallel, one pipeline stage, bf16 or fp8 and microbatches of
    one shape."""
    bucket_size: int = 0
    """Parameters whose gradients, and weights, are sent together where that overlaps; 0: megatron-core's
    choice, 40 million or, if more, 1 million a data parallel rank. On the first pipeline stage; later ones
    have one bucket."""
    cuda_graphs: bool = False
    """On CUDA, record the kernels of each layer's passes once and replay them in every step, which spares
    the CPU their launches; for one pipeline stage, one shape of microbatches, fp32 or bf16 and
    training.recompute none."""
    fully_sharded: bool = False
    """Shard parameters, gradients and optimizer state over data and context parallel ranks (ZeRO-3, torch's
    FSDP2); fp32 and one pipeline stage only, and without the distributed optimizer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where the machine has it; the others refuse to run on anything else."""
    deterministic: bool = False
    """On CUDA, take only kernels that give the same bits run after run; a CPU always does."""
    intra_op_threads: int = 1
    """CPU threads of one process; a different count changes the last bits of a CPU run."""
    collective_timeout_seconds: float = 1800.0
    """How long a collective waits for a silent peer before the job ends."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "intra_op_threads",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"parallel.{name}: {getattr(self, name)} is below 1")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise InputError("parallel.sequence_parallel: needs parallel.tensor_model_parallel_size above 1")
        if self.virtual_pipeline_model_parallel_size > 1 and self.pipeline_model_parallel_size == 1:
            raise InputError(
                "parallel.virtual_pipeline_model_parallel_size: needs parallel.pipeline_model_parallel_size "
                "above 1"
            )
        if self.fully_sharded:
            self._check_fully_sharded()
        self._check_overlap()
        if self.collective_timeout_seconds <= 0:
            raise InputError(
                f"parallel.collective_timeout_seconds: {self.collective_timeout_seconds} is not above 0"
            )

    def _check_overlap(self) -> None:
        if self.overlap_tensor_parallel and not self.sequence_parallel:
            raise InputError("parallel.overlap_tensor_parallel: needs parallel.sequence_parallel")
        if self.bucket_size < 0:
            raise InputError(f"parallel.bucket_size: {self.bucket_size} is below 0")
        if self.bucket_size and not self.overlap_grad_reduce:
            raise InputError(
                "parallel.bucket_size: nothing is cut into buckets without parallel.overlap_grad_reduce"
            )
        if self.overlap_param_gather and not (self.overlap_grad_reduce and self.use_distributed_optimizer):
            raise InputError(
                "parallel.overlap_param_gather: needs parallel.overlap_grad_reduce and "
                "parallel.use_distributed_optimizer"
            )

    def _check_fully_sharded(self) -> None:
        if self.use_distributed_optimizer:
            raise InputError(
                "parallel.use_distributed_optimizer: True, and parallel.fully_sharded needs False: it shards "
                "the optimizer by itself"
            )
        if self.overlap_grad_reduce:
            raise InputError(
                "parallel.overlap_grad_reduce: True, while parallel.fully_sharded overlaps by itself"
            )
        if self.pipeline_model_parallel_size > 1:
            raise InputError(
                f"parallel.pipeline_model_parallel_size: {self.pipeline_model_parallel_size}, and "
                "parallel.fully_sharded needs 1"
            )

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model in a world of `world_size` processes.

        Args:
            world_size: processes of the job.

        Returns:
            World size over tensor x pipeline x context.

        Raises:
            InputError: tensor x pipeline x context does not divide the world.
        """
        tensor, pipeline = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        context = self.context_parallel_size
        if world_size % (tensor * pipeline * context):
            raise InputError(
                f"parallel: tensor_model_parallel_size {tensor} x pipeline_model_parallel_size {pipeline} "
                f"x context_parallel_size {context} does not divide the world size {world_size}"
            )
        return world_size // (tensor * pipeline * context)

    def check_lengths(self, multiple: int) -> None:
        """Refuse sequences that this layout cannot cut into equal parts.

        Args:
            multiple: what divides the positions of every forward.

        Raises:
            InputError: the parts of context or sequence parallelism do not divide it.
        """
        context, tensor = self.context_parallel_size, self.tensor_model_parallel_size
        lengths = f"lengths that are multiples of {multiple} (data.seq_length, objective.ssl_multiple)"
        if context > 1 and multiple % (2 * context):
            raise InputError(f"parallel.context_parallel_size: twice {context} does not divide {lengths}")
        if self.sequence_parallel and multiple % (tensor * context):
            raise InputError(
                f"parallel.sequence_parallel: tensor_model_parallel_size {tensor} x context_parallel_size "
                f"{context} does not divide {lengths}"
            )


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
        InputError: CUDA is asked for and absent, or this local rank is beyond the several devices visible.
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
    _silence_megatron()
    present = torch.cuda.is_available()
    if config.device == "cuda" and not present:
        raise InputError("parallel.device: cuda is asked for, and this machine has no usable CUDA device")
    if present and config.device != "cpu":
        count = torch.cuda.device_count()
        if count > 1 and environment.local_rank >= count:
            raise InputError(
                f"parallel.device: {environment.local_world_size} processes on a machine with {count} devices"
            )
        device = torch.device("cuda", environment.local_rank if count > 1 else 0)
        torch.cuda.set_device(device)
        return device
    from megatron_dlm.platform import cpu

    cpu.install()
    return torch.device("cpu")


def _silence_megatron() -> None:
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
    # On a CPU one generator plays both, so saving and restoring "CUDA's" changes the other.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def start_parallel(environment: ProcessEnvironment, config: ParallelConfig) -> ParallelState:
    """Start the default process group and megatron-core's groups; all ranks call it once.

    Args:
        environment: from `launch.detect_environment`.
        config: sizes of the axes; checked against the world size first.

    Returns:
        This process's place.
    """
    config.data_parallel_size(environment.world_size)
    device = prepare_device(environment, config)
    start_process_group(
        environment,
        backend="nccl" if device.type == "cuda" else "gloo",
        timeout_seconds=config.collective_timeout_seconds,
    )
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
    )


T = TypeVar("T")


def on_first_rank(state: ParallelState, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give its result to all ranks; all ranks call it.

    Args:
        state: this process's place.
        action: of rank 0 alone; its result must be picklable.

    Returns:
        What the action returned, on every rank.

    Raises:
        InputError: rank 0's complaint, on every rank, so that none waits for one that has left.
        TrainingError: likewise.
        RuntimeError: the text of any other failure of rank 0, on the other ranks.
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
