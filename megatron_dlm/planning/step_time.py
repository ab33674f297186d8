"""Time of an optimizer step on GPUs, from counted FLOPs and bytes and the speeds they are done at.

Work is counted for the slowest pipeline stage; communication is what computation does not hide.
Shape legend as in stage.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_dlm.planning.gpus import Gpu, Shares
from megatron_dlm.planning.stage import BF16, FP32, Stage
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.forward_passes import ForwardPass

ATTENTION_PASSES = 3.5
"""Attention in units of a forward pass: backward has five products for the forward pass's two."""
NORM_BYTES = {"forward": 28, "backward": 40, "recomputed": 12}
"""Bytes for each element of the residual stream: norm 6 and 14, gate with norm 12 and 18, last gate 10 and 8;
docs/benchmarks.md, what kernels move."""
ROTARY_BYTES = 32
"""For each element of the heads: rotation of query and key, and the copies of value and of all gradients."""
GELU_BYTES = {"forward": 4, "backward": 6}
ACCUMULATION_BYTES = 10
"""For each weight and microbatch: its bf16 gradient is read and added to the fp32 one."""
LOGIT_BYTES = 12
"""For each logit: written, read twice and written by the loss, and read by two products."""
OPTIMIZER_BYTES = 30
"""For each parameter of a rank's share: gradient, main weight and two moments read, the last three and the
bf16 weight written."""
GRADIENT_BYTES = 16
"""For each parameter: gradients are set to zero, divided by the tokens, and read for their norm."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by what they are spent on."""

    products: float
    """Matrix products of the layers."""
    attention: float
    head: float
    """Products and losses of the head."""
    memory_bound: float
    """Norms, gates, GELU, rotary embeddings, casts, accumulation of gradients."""
    idle: float
    """The GPU waits for its next kernel."""
    tensor_communication: float
    """Tensor and context parallel communication that is not hidden."""
    pipeline: float
    """Pipeline bubble, and sends between stages."""
    data_communication: float
    """Reduction of gradients and gathering of weights that is not hidden."""
    optimizer: float
    data: float
    """Waiting for batches."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(getattr(self, field.name) for field in fields(self))


def step_time(
    config: RunConfig,
    processes: int,
    passes: Sequence[tuple[float, ForwardPass]],
    vocabulary_size: int,
    gpu: Gpu,
    gpus_per_node: int,
    shares: Shares,
) -> StepTime:
    """Time of an optimizer step.

    Args:
        config: configuration that fits the number of processes.
        processes: GPUs of the job.
        passes: mean passes of a microbatch, with how many of each it has.
        vocabulary_size: number of token ids, including the mask token.
        gpu: data sheet.
        gpus_per_node: GPUs that are linked with each other.
        shares: shares of the data sheet that are reached.

    Returns:
        Seconds by what they are spent on.
    """
    stages = config.parallel.pipeline_model_parallel_size
    per_stage = []
    for stage in range(stages):
        parts = [
            [
                count * seconds
                for seconds in _Pass(
                    Stage(config, processes, forward, vocabulary_size, "cuda", stage),
                    gpu,
                    gpus_per_node,
                    shares,
                ).seconds()
            ]
            for count, forward in passes
        ]
        per_stage.append([sum(values) for values in zip(*parts, strict=True)])
    slowest = max(per_stage, key=sum)
    first = Stage(config, processes, passes[0][1], vocabulary_size, "cuda", 0)
    count = first.microbatches_of_step
    products, attention, head, memory_bound, idle, tensor = (count * value for value in slowest)
    one = sum(map(sum, per_stage)) / stages
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    bubble = (stages - 1) / chunks * one
    links = _Links(config, processes, gpu, gpus_per_node, shares)
    pipeline = bubble + count * chunks * links.sends(first, one)
    computed = count * sum(slowest)
    communication = links.data_parallel(first, computed, sum(slowest))
    optimizer = _optimizer(first) / (shares.memory * gpu.memory_tb_s * 1e12)
    busy = computed + pipeline + communication + optimizer
    samples = config.training.global_batch_size / config.parallel.data_parallel_size(processes)
    loading = samples * config.data.seq_length / shares.loader_tokens_per_second
    waiting = loading if not config.data.workers else max(0.0, loading / config.data.workers - busy)
    return StepTime(
        products, attention, head, memory_bound, idle, tensor, pipeline, communication, optimizer, waiting
    )


class _Pass:
    """Forward and backward of one pass through one stage."""

    def __init__(self, stage: Stage, gpu: Gpu, gpus_per_node: int, shares: Shares) -> None:
        self.stage, self.gpu, self.shares = stage, gpu, shares
        self.links = _Links(stage.config, stage.processes, gpu, gpus_per_node, shares)
        self.bytes_per_second = shares.memory * gpu.memory_tb_s * 1e12
        self.bf16 = gpu.bf16_tflops * 1e12 / (1 if stage.dtype_bytes == BF16 else 2)
        self.is_full = stage.config.training.recompute == "full"

    def seconds(self) -> tuple[float, float, float, float, float, float]:
        """Products, attention, head, memory-bound kernels, idle time, communication of tensor and context."""
        s, shares = self.stage, self.shares
        layers, passes = sum(s.chunk_layers), 4 if self.is_full else 3
        matrices = s.matrices_of_layer()
        rate = self.bf16 * shares.products
        layer_rate = self.gpu.fp8_tflops * 1e12 * shares.fp8_products if s.is_fp8 else rate
        products = layers * passes * 2 * matrices * s.T / layer_rate
        pairs = s.forward.work.attention_pairs / s.parallel.context_parallel_size
        attention_passes = ATTENTION_PASSES + (1 if self.is_full else 0)
        attention = layers * attention_passes * 4 * pairs * s.a / (self.bf16 * shares.attention)
        head = self._head(rate) if s.is_last else 0.0
        memory_bound = layers * self._layer_bytes(matrices) / self.bytes_per_second
        tensor = layers * self.links.tensor(s, self.is_full)
        tensor += layers * self.links.context(s, attention / layers if layers else 0.0)
        idle = shares.idle_seconds * layers / s.model.num_layers
        return products, attention, head, memory_bound, idle, tensor

    def _head(self, rate: float) -> float:
        s = self.stage
        chunks = math.ceil(s.R / s.head_rows)
        moved = LOGIT_BYTES * s.R * s.Vp + chunks * ACCUMULATION_BYTES * s.Vp * s.d
        return 6 * s.R * s.Vp * s.d / rate + moved / self.bytes_per_second

    def _layer_bytes(self, matrices: int) -> float:
        """Bytes that a layer's kernels move beside its products and attention."""
        s, recompute = self.stage, self.stage.config.training.recompute
        scale = s.dtype_bytes / BF16
        norms, gelu = NORM_BYTES["forward"] + NORM_BYTES["backward"], sum(GELU_BYTES.values())
        if self.is_full:
            norms, gelu = norms + NORM_BYTES["forward"], gelu + GELU_BYTES["forward"]
        elif not s.is_fp8:
            norms += NORM_BYTES["recomputed"] if recompute in ("norms", "selective") else 0
            gelu += GELU_BYTES["forward"] if recompute == "selective" else 0
        moved = norms * s.S * s.d + scale * (gelu * s.T * s.f + ROTARY_BYTES * s.T * s.a)
        if s.is_fp8:
            # Inputs and gradients of the four products.
            moved += self.shares.fp8_casts_bytes * (2 * s.S * s.d + s.T * (s.a + s.f))
        return moved + ACCUMULATION_BYTES * matrices


class _Links:
    """What goes between GPUs, and how fast."""

    def __init__(
        self, config: RunConfig, processes: int, gpu: Gpu, gpus_per_node: int, shares: Shares
    ) -> None:
        self.parallel, self.shares = config.parallel, shares
        self.link, self.network = (
            shares.communication * speed * 1e9 for speed in (gpu.link_gb_s, gpu.network_gb_s)
        )
        self.per_node = gpus_per_node
        self.tensor_size = self.parallel.tensor_model_parallel_size
        self.context_size = self.parallel.context_parallel_size
        self.shards = self.parallel.data_parallel_size(processes) * self.context_size
        self.processes = processes

    def _speed(self, ranks: int, stride: int) -> float:
        """Bytes per second of a group of ranks that lie `stride` apart."""
        if ranks * stride <= self.per_node:
            return self.link
        # Each of the group's ranks on a node has a network card of its own.
        return min(self.link, max(1, self.per_node // stride) * self.network)

    def _gather(self, total_bytes: float, ranks: int, stride: int) -> float:
        """Seconds to gather, or to reduce and scatter, this many bytes."""
        if ranks == 1:
            return 0.0
        latency = self.shares.latency_seconds * math.log2(ranks)
        return latency + total_bytes * (ranks - 1) / ranks / self._speed(ranks, stride)

    def tensor(self, stage: Stage, is_full: bool) -> float:
        """Seconds of a layer's tensor parallel communication, both passes."""
        hidden = stage.dtype_bytes * stage.T * stage.d
        # A sum over all ranks is a reduction and a gathering; sequence parallelism gathers inputs once more.
        gathers = 8 + (2 if self.parallel.sequence_parallel else 0) + (4 if is_full else 0)
        seconds = gathers * self._gather(hidden, self.tensor_size, 1)
        # User buffers hide all but the first of the pieces that a product is cut into.
        return seconds / self.tensor_size if self.parallel.overlap_tensor_parallel else seconds

    def context(self, stage: Stage, attention_seconds: float) -> float:
        """Seconds of a layer's context parallel communication that attention does not hide."""
        keys_values = 2 * stage.dtype_bytes * stage.T * stage.a * self.context_size
        seconds = 3 * self._gather(keys_values, self.context_size, self.tensor_size)
        return max(0.0, seconds - attention_seconds)

    def sends(self, stage: Stage, pass_seconds: float) -> float:
        """Seconds of a microbatch's sends to the next stage and back that are not hidden."""
        stages = self.parallel.pipeline_model_parallel_size
        if stages == 1:
            return 0.0
        speed = self.link if self.processes <= self.per_node else self.network
        seconds = 2 * (FP32 * stage.S * stage.d / speed + self.shares.latency_seconds)
        # Interleaved chunks send while the next chunk computes.
        hidden = pass_seconds / len(stage.chunk_layers) if len(stage.chunk_layers) > 1 else 0.0
        return max(0.0, seconds - hidden)

    def data_parallel(self, stage: Stage, computed: float, one_microbatch: float) -> float:
        """Seconds of gradients and weights on their way that computation does not hide."""
        stride, count = self.tensor_size, float(stage.parameters())
        gather, reduce = (
            self._gather(size * count, self.shards, stride) for size in (stage.dtype_bytes, FP32)
        )
        if self.parallel.fully_sharded:
            seconds = stage.microbatches_of_step * (2 * gather + reduce)
            # Nothing hides the first gathering and the last reduction, of a layer each.
            return max(seconds - computed, (gather + reduce) / stage.model.num_layers)
        if not self.parallel.use_distributed_optimizer:
            gather = reduce
        if self.parallel.overlap_grad_reduce:
            # Only the last microbatch's backward pass has whole gradients to send.
            reduce = max(0.0, reduce - 2 / 3 * one_microbatch)
        if self.parallel.overlap_param_gather:
            gather = max(0.0, gather - one_microbatch / 3)
        return gather + reduce


def _optimizer(stage: Stage) -> float:
    """Bytes that an optimizer step moves on a rank."""
    count = float(stage.parameters())
    held = count / stage.shards if stage.parallel.fully_sharded else count
    return OPTIMIZER_BYTES * count / stage.optimizer_shards() + GRADIENT_BYTES * held
