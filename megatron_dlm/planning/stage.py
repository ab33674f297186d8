"""One rank of a layout: its sizes, and the parameters that it holds.

Shape legend: T positions of a microbatch on a rank, S of them where sequence parallelism shares them, d
hidden size, f width of the MLP, a width of the heads, Vp vocabulary columns; all of one tensor parallel rank.
"""

from __future__ import annotations

from typing import Literal

from megatron_dlm.models.head_chunks import rows_per_chunk
from megatron_dlm.models.sizes import (
    final_layer_parameters,
    layer_matrices,
    layer_parameters,
    time_embedder_parameters,
)
from megatron_dlm.platform.vocab_parallel import padded_vocabulary_size
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.forward_passes import ForwardPass

DeviceType = Literal["cpu", "cuda"]
BF16, FP32 = 2, 4
"""Bytes."""


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
        multiple = parallel.vocabulary_multiple(device)
        self.Vp = padded_vocabulary_size(vocabulary_size, self.tensor, multiple) // self.tensor
        self.head_rows = rows_per_chunk(config.training.head_rows_per_chunk, self.Vp, device)
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
            count += self.Vp * (self.d + 1) + final_layer_parameters(self.model)
        return count
