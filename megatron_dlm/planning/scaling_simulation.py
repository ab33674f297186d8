"""Speed of one layout on more and more GPUs, with one batch (strong) or one batch per GPU (weak)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_dlm.planning.layouts import is_legal
from megatron_dlm.planning.plan import Cluster, Estimate, Planner
from megatron_dlm.run.config import RunConfig

MOST_GPUS = 4096
ASSUMPTIONS = (
    "GPUs of equal speed; collectives at 80% of the data sheet's bandwidth, without traffic of other jobs, "
    "and 15 us for each doubling of ranks; no stragglers, failures, evaluation or saving"
)


@dataclass(frozen=True)
class ScalingPoint:
    """One number of GPUs."""

    gpus: int
    estimate: Estimate

    @property
    def tokens_per_second(self) -> float:
        """Speed of all GPUs together."""
        return self.estimate.tokens_per_second_per_gpu * self.gpus


def simulate_scaling(chosen: Estimate, vocabulary_size: int) -> tuple[list[ScalingPoint], list[ScalingPoint]]:
    """A layout's speed from its smallest number of nodes to 4,096 GPUs.

    Data parallelism takes all further GPUs. In the weak series each GPU has the share of the batch that
    it has in `chosen`.

    Args:
        chosen: estimate of a layout.
        vocabulary_size: number of token ids, including the mask token.

    Returns:
        Points at equal global batch, and at equal batch per GPU; numbers of GPUs that the batch cannot be
        divided over, or on which the layout does not fit, are left out.
    """
    per_node = chosen.cluster.gpus_per_node
    nodes = [count for count in (1 << n for n in range(13)) if count * per_node <= MOST_GPUS]
    strong, weak = [], []
    training = chosen.config.training
    for count in nodes:
        cluster = replace(chosen.cluster, nodes=count)
        share = training.global_batch_size * cluster.gpus
        strong += _point(chosen.config, cluster, training.global_batch_size, vocabulary_size)
        if share % chosen.cluster.gpus == 0:
            weak += _point(chosen.config, cluster, share // chosen.cluster.gpus, vocabulary_size)
    return strong, weak


def _point(config: RunConfig, cluster: Cluster, batch_size: int, vocabulary_size: int) -> list[ScalingPoint]:
    """The layout on a cluster, with the largest microbatch up to its own that the batch allows."""
    micro = config.training.micro_batch_size
    while micro:
        training = replace(
            config.training, global_batch_size=batch_size, micro_batch_size=micro, ramp_start=0
        )
        training = replace(training, ramp_increment=0, ramp_samples=0)
        # Evaluation has a batch of its own, which is no part of a step.
        evaluation = replace(config.evaluation, batch_size=batch_size)
        shaped = replace(config, training=training, evaluation=evaluation)
        if is_legal(shaped, cluster.gpus):
            estimate = Planner(shaped, cluster, vocabulary_size).estimate(shaped)
            return [ScalingPoint(cluster.gpus, estimate)] if estimate.fits else []
        micro //= 2
    return []
