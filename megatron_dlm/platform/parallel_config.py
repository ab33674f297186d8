"""Sizes of the parallel axes, and what overlaps; needs neither a process group nor torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_dlm.interfaces import InputError

CUDA_VOCABULARY_MULTIPLE = 128
"""Vocabulary columns are padded to this multiple on CUDA: at 32,001 columns cuBLAS uses slow, old kernels."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is split over processes; data parallelism takes the rest of them."""

    tensor_model_parallel_size: int = 1
    """Tensor parallel size: processes that share each layer's weights."""
    pipeline_model_parallel_size: int = 1
    """Pipeline parallel size: stages of layers; where layers do not divide evenly the first stages have one
    more."""
    virtual_pipeline_model_parallel_size: int = 1
    """Chunks of layers per pipeline stage, for the interleaved pipeline schedule."""
    context_parallel_size: int = 1
    """Context parallel size: processes that share each sequence; the sequence length must be a multiple of
    twice this."""
    sequence_parallel: bool = False
    """Shard norms and the residual stream along the sequence over tensor parallel ranks, instead of
    replicating them."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Overlap the reduction of gradients over data parallel ranks with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the gathering of weights that the distributed optimizer has updated with the next forward pass;
    needs overlap_grad_reduce."""
    overlap_tensor_parallel: bool = False
    """Overlap tensor parallel communication with matrix products, by Transformer Engine's user buffers; CUDA
    only, with sequence_parallel, one pipeline stage, bf16 or fp8, and microbatches of one shape."""
    bucket_size: int = 0
    """Parameters per bucket of overlapped gradient and weight communication; 0: megatron-core's choice, 40
    million or, if more, 1 million per data parallel rank. Applies to the first pipeline stage; later ones
    have one bucket."""
    cuda_graphs: bool = False
    """Record the kernels of each layer as CUDA graphs and replay them, which saves the CPU their launches.
    CUDA only, with one pipeline stage, microbatches of one shape, fp32 or bf16, and training.recompute
    none."""
    fully_sharded: bool = False
    """Shard parameters, gradients and optimizer state over data and context parallel ranks (ZeRO-3, PyTorch's
    FSDP2), in fp32, or in bf16 with fp32 shards; one pipeline stage, without the distributed optimizer."""
    pad_vocabulary_to: int = 0
    """Pad the vocabulary of embedding and head to a multiple of this times tensor_model_parallel_size, for
    fast matrix products on GPUs (Megatron-LM's --make-vocab-size-divisible-by); 0: 128 on CUDA, 1 on a CPU.
    Checkpoints do not depend on it, nor do losses up to rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device type to train on; auto: CUDA if there is a GPU, otherwise CPU. The others fail where there is no
    such device."""
    deterministic: bool = False
    """On CUDA, use only kernels that give the same bits in every run; a CPU always does."""
    intra_op_threads: int = 1
    """CPU threads per process; another number changes the last bits of a CPU run."""
    idle_ranks: bool = False
    """Where the sizes do not divide by all processes of the job, the largest number that divides works and
    the other processes wait; without it such a job is refused. For jobs whose number of nodes changes."""
    collective_timeout_seconds: float = 1800.0
    """Seconds that a collective operation waits for a silent rank before the job ends."""

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
        if self.pad_vocabulary_to < 0:
            raise InputError(f"parallel.pad_vocabulary_to: {self.pad_vocabulary_to} is below 0")
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

    def vocabulary_multiple(self, device_type: str) -> int:
        """Divisor of each rank's vocabulary columns: `pad_vocabulary_to`, or the device's default if 0."""
        return self.pad_vocabulary_to or (CUDA_VOCABULARY_MULTIPLE if device_type == "cuda" else 1)

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

    def check_lengths(self, multiple: int, seq_length: int) -> None:
        """Refuse sequences that this layout cannot cut into equal parts.

        Args:
            multiple: number that divides the sequence length of every forward pass.
            seq_length: the longest of these lengths.

        Raises:
            InputError: context or sequence parallelism needs a divisor that `multiple` does not have.
        """
        context, tensor = self.context_parallel_size, self.tensor_model_parallel_size
        needed = math.lcm(
            2 * context if context > 1 else 1, tensor * context if self.sequence_parallel else 1
        )
        option = "data.seq-length" if seq_length % needed else "objective.ssl-multiple"
        lengths = f"lengths that are multiples of {multiple}; --{option} has to be a multiple of {needed}"
        if context > 1 and multiple % (2 * context):
            raise InputError(f"parallel.context_parallel_size: twice {context} does not divide {lengths}")
        if self.sequence_parallel and multiple % (tensor * context):
            raise InputError(
                f"parallel.sequence_parallel: tensor_model_parallel_size {tensor} x context_parallel_size "
                f"{context} does not divide {lengths}"
            )
