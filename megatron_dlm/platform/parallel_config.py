"""Sizes of the parallel axes, and what overlaps; needs neither a process group nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dlm.interfaces import InputError

CUDA_VOCABULARY_MULTIPLE = 128
"""Columns that cuBLAS's fastest kernels take; at 32,001 it falls back to those of an old architecture."""


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
    FSDP2), in fp32, or with weights gathered in bf16 from their fp32 shards; one pipeline stage only, and
    without the distributed optimizer."""
    pad_vocabulary_to: int = 0
    """Pad the rows of embedding and head with zeros to a multiple of this times tensor_model_parallel_size,
    which GPU matrix products need to be fast (Megatron-LM's --make-vocab-size-divisible-by); 0: 128 on CUDA,
    1 on a CPU. No checkpoint depends on it, and no loss up to rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where the machine has it; the others refuse to run on anything else."""
    deterministic: bool = False
    """On CUDA, use only kernels that give the same bits in every run; a CPU always does."""
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
        """What divides the columns of embedding and head on a rank, by what is asked for or the device."""
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
