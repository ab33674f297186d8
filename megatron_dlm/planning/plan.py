"""Compares all layouts of a run on a cluster: what fits, how long a step takes, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_dlm.interfaces import InputError
from megatron_dlm.models.config import Precision
from megatron_dlm.planning.gpus import H100_SHARES, Gpu, Shares, usable_gib
from megatron_dlm.planning.layouts import AXES, legal_layouts
from megatron_dlm.planning.memory import RankMemory, rank_memory
from megatron_dlm.planning.step_time import StepTime, step_time
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.forward_passes import SampledPasses, sampled_passes
from megatron_dlm.run.validation import check_run

GIB = 2.0**30


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a job."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    shares: Shares = H100_SHARES

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: {getattr(self, name)} is below 1")

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Estimate:
    """What one layout needs."""

    config: RunConfig
    cluster: Cluster
    memory: RankMemory
    time: StepTime
    flops: float
    """Useful matrix-product FLOPs of a step, recomputation not counted."""

    @property
    def fits(self) -> bool:
        """Whether a rank's memory suffices."""
        return self.memory.total <= usable_gib(self.cluster.gpu) * GIB

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens per second and GPU."""
        tokens = self.config.training.global_batch_size * self.config.data.seq_length
        return tokens / self.time.total / self.cluster.gpus

    @property
    def mfu(self) -> float:
        """Useful FLOPs as a share of the data sheet's bf16 speed."""
        return self.flops / (self.time.total * self.cluster.gpus * self.cluster.gpu.bf16_tflops * 1e12)

    @property
    def hours(self) -> float:
        """Hours of the whole run, without evaluation and saving."""
        training = self.config.training
        samples = training.samples_ahead(0, training.num_steps)
        return samples / training.global_batch_size * self.time.total / 3600


class Planner:
    """Estimates layouts of one run on one cluster."""

    def __init__(self, config: RunConfig, cluster: Cluster, vocabulary_size: int) -> None:
        self.config, self.cluster, self.vocabulary_size = config, cluster, vocabulary_size
        self._passes = lru_cache(maxsize=None)(self._draw)

    def _draw(self, micro_batch_size: int) -> SampledPasses:
        training = replace(self.config.training, micro_batch_size=micro_batch_size)
        return sampled_passes(replace(self.config, training=training), self.vocabulary_size)

    def memory(self, config: RunConfig) -> RankMemory:
        """Memory of a layout's fullest rank."""
        largest = self._passes(config.training.micro_batch_size).largest
        return rank_memory(config, self.cluster.gpus, largest, self.vocabulary_size, "cuda")

    def estimate(self, config: RunConfig, memory: RankMemory | None = None) -> Estimate:
        """Memory and time of a layout.

        Args:
            config: a configuration that fits the cluster.
            memory: of this layout, if it is known.

        Returns:
            Both.

        Raises:
            InputError: the layout cannot run on this number of GPUs, or the GPU has no FP8.
        """
        cluster = self.cluster
        check_run(config, cluster.gpus)
        if config.training.precision == "fp8" and not cluster.gpu.fp8_tflops:
            raise InputError(f"training.precision: fp8, and {cluster.gpu.name} has no FP8")
        drawn = self._passes(config.training.micro_batch_size)
        time = step_time(
            config,
            cluster.gpus,
            drawn.means,
            self.vocabulary_size,
            cluster.gpu,
            cluster.gpus_per_node,
            cluster.shares,
        )
        flops = drawn.training_flops(config.model, self.vocabulary_size) * config.training.global_batch_size
        return Estimate(config, cluster, memory or self.memory(config), time, flops)

    def ranked(self, precisions: Sequence[Precision]) -> list[Estimate]:
        """All layouts that fit, fastest first; of equally fast ones the simplest.

        Args:
            precisions: precisions to try.

        Returns:
            Estimates; empty if nothing fits.
        """
        cluster, found = self.cluster, []
        for layout in legal_layouts(self.config, cluster.gpus, cluster.gpus_per_node, precisions):
            if layout.training.precision == "fp8" and not cluster.gpu.fp8_tflops:
                continue
            memory = self.memory(layout)
            if memory.total <= usable_gib(cluster.gpu) * GIB:
                found.append(self.estimate(layout, memory))
        return sorted(found, key=_order)


def nearest(own: RunConfig, fitting: Sequence[Estimate]) -> Estimate | None:
    """The layout that fits and differs on the fewest axes, of these the fastest.

    Args:
        own: a run.
        fitting: layouts that fit, fastest first.

    Returns:
        Its estimate; None if nothing fits.
    """

    def changed_axes(estimate: Estimate) -> int:
        return sum(choice_of(own) != choice_of(estimate.config) for choice_of in AXES.values())

    return min(fitting, key=changed_axes, default=None)


def _order(estimate: Estimate) -> tuple[float, ...]:
    """Time to three digits, then how much there is to communicate and to keep."""
    parallel = estimate.config.parallel
    return (
        float(f"{estimate.time.total:.3g}"),
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        estimate.memory.total,
    )
