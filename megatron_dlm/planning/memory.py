"""Memory of a rank at its peak, counted tensor by tensor from what the layers keep for the backward pass.

Nothing here is fitted: each term is a tensor of models/ with its shape and dtype. The peak is the largest of
three moments: the head's losses while everything is kept, the backward pass of the last layer's MLP, and the
optimizer's step.
Shape legend as in stage.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_dlm.models.config import Recompute
from megatron_dlm.models.sizes import final_layer_parameters, layer_parameters, time_embedder_parameters
from megatron_dlm.planning.stage import FP32, DeviceType, Stage
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.forward_passes import ForwardPass

ADAM_MOMENTS = 2 * FP32


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank at its peak, on the pipeline stage that has most."""

    parameters: float
    """Weights, and their FP8 copies."""
    gradients: float
    """Accumulated gradients, fp32."""
    optimizer: float
    """AdamW's two moments, and fp32 main weights where the weights are not fp32."""
    gathered: float
    """Fully sharded weights that are whole at a time, with the gradients on their way to their shards."""
    activations: float
    """What layers keep for the backward pass, of all microbatches in flight."""
    workspace: float
    """What the busiest moment adds: the head's logits, or gradients in the backward pass of a layer."""
    stage: int
    """Pipeline stage."""

    @property
    def total(self) -> float:
        """Bytes of all of it."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "stage")


def rank_memory(
    config: RunConfig,
    processes: int,
    largest: ForwardPass,
    vocabulary_size: int,
    device: DeviceType,
) -> RankMemory:
    """Memory of the rank that needs most.

    Args:
        config: configuration that fits the number of processes.
        processes: processes of the job.
        largest: the forward pass of its microbatches that needs most.
        vocabulary_size: number of token ids, including the mask token.
        device: on CUDA, layers are this package's kernels and Transformer Engine's.

    Returns:
        Bytes by what they hold.
    """
    stages = config.parallel.pipeline_model_parallel_size
    return max(
        (
            _StageMemory(config, processes, largest, vocabulary_size, device, stage).memory()
            for stage in range(stages)
        ),
        key=lambda memory: memory.total,
    )


class _StageMemory(Stage):
    """Bytes of a rank of one pipeline stage."""

    def memory(self) -> RankMemory:
        """Bytes at the peak."""
        held = self._held()
        kept = self._kept_in_flight()
        workspace = max(self._layer_backward(), self._head() if self.is_last else 0.0)
        # When gradients are reduced and the optimizer steps nothing is kept any more.
        finish = max(2.0 * FP32 * self._largest_tensor() / self.optimizer_shards(), self._gloo_buffers())
        return RankMemory(**held, activations=kept, workspace=max(workspace, finish - kept), stage=self.stage)

    def _gloo_buffers(self) -> float:
        """On a CPU, copies of gradients to reduce and of weights that are gathered; NCCL has none."""
        is_shared = self.shards > 1 and self.parallel.use_distributed_optimizer
        return (FP32 + self.dtype_bytes) * self.parameters() if is_shared and not self.fused else 0.0

    def _largest_tensor(self) -> int:
        return max(self.Vp * self.d if self.is_first or self.is_last else 0, self.d * self.f)

    def _held(self) -> dict[str, float]:
        """Bytes that stay from step to step."""
        count = float(self.parameters())
        main = 0 if self.dtype_bytes == FP32 else FP32
        state = ADAM_MOMENTS + (FP32 if self.config.optimizer.ema_decay else 0)
        if self.parallel.fully_sharded:
            own = count / self.shards
            sizes = {"parameters": FP32 * own, "gradients": FP32 * own, "optimizer": state * own}
            return sizes | {"gathered": self._gathered() if self.shards > 1 else 0.0}
        parameters = self.dtype_bytes * count
        if self.is_fp8:
            # A copy for each of the two directions of a product; weights that are FP8 themselves are these.
            matrices = sum(self.chunk_layers) * self.matrices_of_layer()
            parameters += (2 - (self.dtype_bytes if self.config.fp8.weights else 0)) * matrices
        optimizer = (state + main) * count / self.optimizer_shards()
        return {"parameters": parameters, "gradients": FP32 * count, "optimizer": optimizer, "gathered": 0.0}

    def _gathered(self) -> float:
        """Whole weights while a layer runs and the next one's arrive, and a layer's gradients.

        What arrives does so in one buffer, from which it is copied; so are gradients that leave.
        """
        layer = layer_parameters(self.model, self.tensor)
        rest = time_embedder_parameters(self.model) + self.Vp * self.d + final_layer_parameters(self.model)
        weights = self.dtype_bytes * max(self.Vp * (self.d + 1), rest + 3 * layer)
        return weights + (self.dtype_bytes + FP32) * layer

    def _kept_in_flight(self) -> float:
        """What is kept for the backward pass when most microbatches are under way."""
        per_chunk = [self._kept_by_chunk(layers) for layers in self.chunk_layers]
        if len(per_chunk) == 1:
            return min(self.microbatches_of_step, self.stages - self.stage) * per_chunk[0]
        # megatron-core's interleaved schedule: this many passes of chunks before the first backward pass.
        warm_up = (self.stages - self.stage - 1) * 2 + (len(per_chunk) - 1) * self.stages
        passes = min(self.microbatches_of_step * len(per_chunk), warm_up + 1)
        whole, rest = divmod(passes, self.stages * len(per_chunk))
        kept = whole * self.stages * sum(per_chunk)
        for each in per_chunk:
            kept += min(rest, self.stages) * each
            rest -= min(rest, self.stages)
        return kept

    def _kept_by_chunk(self, layers: int) -> float:
        """Bytes that one microbatch's pass through a chunk keeps; the head's are in its workspace."""
        recompute = self.config.training.recompute
        stream = FP32 * self.S * self.d
        kept = layers * (stream if recompute == "full" else self._kept_by_layer(recompute))
        # Sent to the next stage and kept until its gradient comes; the head reads the last one.
        kept += stream
        sequences = self.forward.sequences if self.forward.has_own_positions else 1
        positions = self.T / self.forward.sequences
        kept += FP32 * sequences * positions * self.model.head_dim
        if self.forward.has_mask and not self.fused:
            kept += self._mask_pairs()
        return kept

    def _mask_pairs(self) -> float:
        """Pairs of a dense mask, which all sequences share."""
        positions = self.T / self.forward.sequences
        return positions * positions * self.parallel.context_parallel_size

    def _kept_by_layer(self, recompute: Recompute) -> float:
        """Bytes that a layer keeps for its backward pass, its input included."""
        size = self.dtype_bytes
        stream, branch, wide = FP32 * self.S * self.d, size * self.S * self.d, size * self.T * self.f
        # Its input, and the stream between attention and MLP; means and deviations of two norms.
        kept = 2 * stream + 4 * FP32 * self.S
        kept += self._kept_by_attention()
        if self.fused:
            kept += 2 * branch + wide
            if self.is_fp8:
                # Each linear keeps an FP8 copy of its input.
                return kept + 2 * self.S * self.d + self.T * (self.a + self.f)
            if recompute == "none":
                kept += 2 * branch
            return kept + (wide if recompute != "selective" else 0)
        # The gate keeps its branch in fp32, the norm's modulation what it scales, GELU the biased sum.
        kept += 2 * stream + wide
        if recompute == "none":
            kept += 2 * stream + 2 * branch
        return kept + (wide if recompute != "selective" else 0)

    def _kept_by_attention(self) -> float:
        """Query, key, value, output, and the logarithms of the softmax's sums."""
        size, context = self.dtype_bytes, self.parallel.context_parallel_size
        kept = 4 * size * self.T * self.a + FP32 * self.heads * self.T
        if self.fused:
            return kept
        # Keys and values of all context parallel ranks are whole on each.
        kept += 2 * (context - 1) * size * self.T * self.a
        if self.forward.has_mask:
            kept += size * self._mask_pairs()
        if size != FP32:
            # The rotary table in the layer's dtype, once for queries and once for keys.
            kept += 2 * size * self.T / self.forward.sequences * self.model.head_dim
        return kept

    def _layer_backward(self) -> float:
        """Bytes that the backward pass of a layer's MLP adds to what is kept."""
        recompute, size = self.config.training.recompute, self.dtype_bytes
        stream, branch, wide = FP32 * self.S * self.d, size * self.S * self.d, size * self.T * self.f
        weight = size * self.d * self.f
        added = stream + branch + wide + weight
        if not self.fused:
            # The branch's gradient before its rounding.
            added += stream if size != FP32 else 0
        if self.parallel.sequence_parallel:
            # The gathered input and its gradient, which gloo copies to reduce it.
            added += (2 if self.fused else 3) * size * self.T * self.d
        if recompute == "selective" and not self.is_fp8:
            added += wide * (1 if self.fused else 2)
        if recompute == "full":
            added += self._kept_by_layer("none") - FP32 * self.S * self.d
        return added

    def _head(self) -> float:
        """Bytes of final layer and head while losses are made, beside what layers keep."""
        size = self.dtype_bytes
        # The normed stream, and before its modulation.
        added = FP32 * self.S * self.d * (1 if self.fused else 2)
        if self.parallel.sequence_parallel:
            added += FP32 * self.T * self.d
        # Rows and their gradients.
        added += 2 * size * self.R * self.d
        rows = min(self.R, self.head_rows)
        logits, weight = rows * self.Vp, self.Vp * self.d
        # The weight's gradient is summed in fp32, over chunks whose products have the weight's dtype.
        added += FP32 * weight
        if self.fused:
            return added + size * (logits + weight)
        if size == FP32:
            return added + 2 * FP32 * logits
        return added + (FP32 + size) * (logits + weight)
