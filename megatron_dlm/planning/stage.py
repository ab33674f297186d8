"""One rank of a layout: its sizes, and the parameters that it holds.

Shape legend: T positions of a microbatch on a rank, S of them where sequence parallelism shares them, d
hidden size, f width of the MLP, a width of the heads, Vp vocabulary columns; all of one tensor parallel rank.
"""

from __future__ import annotations

from typing import Literal

from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.time_embedding import FREQUENCY_CHANNELS
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.forward_passes import ForwardPass

DeviceType = Literal["cpu", "cuda"]
BF16, FP32 = 2, 4
"""Bytes."""


def vocabulary_columns(parallel: ParallelConfig, vocabulary_size: int, device: DeviceType) -> int:
    """Columns of embedding and head on one tensor parallel rank, padding included."""
    multiple = parallel.vocabulary_multiple(device) * parallel.tensor_model_parallel_size
    return -(-vocabulary_size // multiple) * multiple // parallel.tensor_model_parallel_size


def layer_parameters(model: ModelConfig, tensor_size: int) -> int:
    """Parameters of a layer on one tensor parallel rank; norms and modulations are whole on each."""
    d, f = model.hidden_size, model.ffn_hidden_size // tensor_size
    return layer_matrices(model, tensor_size) + f + 3 * d + 6 * d * (model.conditioning_size + 1)


def layer_matrices(model: ModelConfig, tensor_size: int) -> int:
    """Weights of a layer's four matrix products on one tensor parallel rank, padded heads included."""
    heads = model.padded_heads(tensor_size) // tensor_size * model.head_dim
    return 4 * model.hidden_size * heads + 2 * model.hidden_size * model.ffn_hidden_size // tensor_size


def time_embedder_parameters(model: ModelConfig) -> int:
    """Parameters of the time embedder, which each chunk of layers has a copy of."""
    c = model.conditioning_size
    return FREQUENCY_CHANNELS * c + c + c * c + c


class Stage:
    """One rank of a pipeline stage of a layout; names of sizes are those of the module's legend."""

    def __init__(
        self,
        config: RunConfig,
        processes: int,
        forward: ForwardPass,
        vocabulary_size: int,
        device: DeviceType,
        stage: int,
    ) -> None:
        parallel, model = config.parallel, config.model
        self.config, self.model, self.forward, self.stage = config, model, forward, stage
        self.parallel, self.processes = parallel, processes
        self.tensor, self.stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        self.shards = parallel.data_parallel_size(processes) * parallel.context_parallel_size
        self.fused = device == "cuda"
        self.T = forward.tokens / parallel.context_parallel_size
        self.S = self.T / (self.tensor if parallel.sequence_parallel else 1)
        self.R = forward.work.head_rows / parallel.context_parallel_size
        self.d, self.f = model.hidden_size, model.ffn_hidden_size // self.tensor
        self.heads = model.padded_heads(self.tensor) // self.tensor
        self.a = self.heads * model.head_dim
        self.Vp = vocabulary_columns(parallel, vocabulary_size, device)
        self.dtype_bytes = FP32 if config.training.precision == "fp32" else BF16
        self.is_fp8 = config.training.precision == "fp8" and self.fused
        self.is_first, self.is_last = stage == 0, stage == self.stages - 1
        chunks = parallel.virtual_pipeline_model_parallel_size
        # Chunk c of stage s is part c * stages + s of the model.
        self.chunk_layers = model.stage_layers(self.stages * chunks)[stage :: self.stages]
        self.microbatches_of_step = config.training.global_batch_size // (
            config.training.micro_batch_size * parallel.data_parallel_size(processes)
        )

    def optimizer_shards(self) -> int:
        """Ranks that share the optimizer's state."""
        is_shared = self.parallel.use_distributed_optimizer or self.parallel.fully_sharded
        return self.shards if is_shared else 1

    def matrices_of_layer(self) -> int:
        """Weights of a layer's matrix products."""
        return layer_matrices(self.model, self.tensor)

    def parameters(self) -> int:
        """Parameters of the rank, before data parallel ranks share them."""
        layers = sum(self.chunk_layers) * layer_parameters(self.model, self.tensor)
        count = layers + len(self.chunk_layers) * time_embedder_parameters(self.model)
        if self.is_first:
            count += self.Vp * self.d
        if self.is_last:
            count += self.Vp * (self.d + 1) + self.final_parameters()
        return count

    def final_parameters(self) -> int:
        """Parameters of the final layer, in front of the head."""
        return self.d + 2 * self.d * (self.model.conditioning_size + 1)
