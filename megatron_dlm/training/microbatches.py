"""One rank's microbatches of a global batch: read and corrupted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dlm.data.blending import SampleReader
from megatron_dlm.data.dali import carry_with_dali
from megatron_dlm.data.loader import microbatch_positions
from megatron_dlm.interfaces import ModelInputs, Targets, TokenBatch
from megatron_dlm.objectives.base import CorruptionContext, Objective, corruption_fingerprint
from megatron_dlm.objectives.documents import corrupt
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.platform.rng import NoiseSource


@dataclass(frozen=True)
class BatchAddress:
    """Which global batch."""

    step: int
    """Optimizer steps, or batches of the evaluation, before it."""
    first_sample: int
    """Position in the run of its first sample."""
    size: int
    """Samples, over all processes."""
    training: bool
    """False asks for the bound alone."""

    def context(self, noise: NoiseSource) -> CorruptionContext:
        """The address of the batch's draws from a source."""
        return CorruptionContext(
            noise=noise,
            step=self.step,
            batch_start=self.first_sample,
            global_batch_size=self.size,
            training=self.training,
        )


@dataclass(frozen=True)
class Microbatch:
    """One forward-backward's share of a global batch, corrupted."""

    sample_indices: NDArray[np.int64]
    """int64 [B], positions in the run."""
    inputs: ModelInputs
    targets: Targets
    fingerprint: int
    """Digest of the samples' corruption."""


def corrupted_parts(
    objective: Objective, batches: Iterable[TokenBatch], context: CorruptionContext
) -> list[Microbatch]:
    """Corrupt batches; a family may need several forwards for one, of different lengths.

    Args:
        objective: the family.
        batches: clean blocks.
        context: address of the draws.

    Returns:
        At least one microbatch for each batch.
    """
    microbatches = []
    for batch in batches:
        for part in objective.split(batch, context):
            inputs, targets = corrupt(objective, part, context)
            fingerprint = corruption_fingerprint(inputs, targets, part)
            microbatches.append(Microbatch(part.sample_indices, inputs, targets, fingerprint))
    return microbatches


class MicrobatchMaker:
    """Reads and corrupts this rank's share of any global batch; the same in every process."""

    def __init__(
        self,
        samples: SampleReader,
        objective: Objective,
        noise: NoiseSource,
        micro_batch_size: int,
        parallel: ParallelState,
    ) -> None:
        self.samples = samples
        self._objective = objective
        self._noise = noise
        self._micro_batch_size = micro_batch_size
        self._data_rank, self._data_size = parallel.data_rank, parallel.data_size

    def __call__(self, address: BatchAddress) -> list[Microbatch]:
        """This rank's microbatches of a global batch."""
        positions = microbatch_positions(
            address.first_sample,
            global_batch_size=address.size,
            micro_batch_size=self._micro_batch_size,
            data_rank=self._data_rank,
            data_size=self._data_size,
        )
        return self.at(address, positions)

    def at(self, address: BatchAddress, positions: Iterable[NDArray[np.int64]]) -> list[Microbatch]:
        """Some samples of a global batch.

        Args:
            address: of the batch.
            positions: int64 [B], in the run, for each microbatch.

        Returns:
            At least one microbatch for each.
        """
        batches = map(self.samples.read, positions)
        return corrupted_parts(self._objective, batches, address.context(self._noise))


def carry(batches: Iterator[list[Microbatch]], device: torch.device) -> Iterator[list[Microbatch]]:
    """Bring what networks read of batches to their device, with DALI, while earlier ones are worked on.

    Args:
        batches: on the CPU.
        device: of the rank.

    Yields:
        The same batches, their inputs on the device.
    """
    waiting: deque[list[Microbatch]] = deque()

    def inputs() -> Iterator[list[Tensor]]:
        for microbatches in batches:
            waiting.append(microbatches)
            yield [tensor for microbatch in microbatches for tensor in microbatch.inputs.tensors()]

    for carried in carry_with_dali(inputs(), device.index if device.type == "cuda" else None):
        tensors = iter(carried)
        yield [
            replace(microbatch, inputs=microbatch.inputs.with_tensors(tensors))
            for microbatch in waiting.popleft()
        ]
