"""Makes a rank's microbatches of a global batch: reads, corrupts and cuts them to what the network needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dlm.data.loading.blending import SampleReader
from megatron_dlm.data.loading.dali import transfer_with_dali
from megatron_dlm.data.loading.data_config import Loader, microbatch_positions
from megatron_dlm.data.loading.pinned import transfer_from_pinned_memory
from megatron_dlm.data.loading.tensor_buffer import with_tensors, without_tensors
from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.families.base import Objective, corruption_fingerprint
from megatron_dlm.families.documents import corrupt
from megatron_dlm.interfaces import AttentionPattern, HeadRows, ModelInputs, Targets, TokenBatch
from megatron_dlm.models.context_parallel import own_share
from megatron_dlm.models.flops.flops_actual import Work, work_of
from megatron_dlm.models.visibility import MaskForms, with_one_mask, with_table
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
    """Samples of one forward and backward pass, corrupted."""

    sample_indices: NDArray[np.int64]
    """int64 [B], positions in the run."""
    inputs: ModelInputs
    targets: Targets
    fingerprint: int
    """Digest of the samples' corruption."""


@dataclass(frozen=True)
class ReadyMicrobatch:
    """What this rank's forward and loss read of a microbatch; all that is not counted is on some device."""

    sample_indices: NDArray[np.int64]
    """int64 [B], positions in the run."""
    inputs: ModelInputs
    """Inputs at this context parallel rank's positions."""
    rows: HeadRows
    """Rows of the head at these positions."""
    token_count: int
    """Tokens whose loss this rank answers for."""
    work: Work
    """What all context parallel ranks compute on."""
    counted_tokens: int
    """Tokens of all of them together."""
    fingerprint: int
    """Digest of the samples' corruption."""


def ready(
    microbatch: Microbatch,
    attention: AttentionPattern,
    forms: MaskForms,
    context_rank: int,
    context_size: int,
) -> ReadyMicrobatch:
    """Leave of a microbatch what is read.

    Args:
        microbatch: on the CPU.
        attention: the family's.
        forms: of masks, that the layers' attention takes.
        context_rank: context parallel rank.
        context_size: context parallel size.

    Returns:
        This rank's share, on the CPU.
    """
    whole = with_one_mask(microbatch.inputs, attention, forms)
    inputs, targets = own_share(whole, microbatch.targets, context_rank, context_size)
    if forms.table:
        inputs = with_table(inputs)
    return ReadyMicrobatch(
        sample_indices=microbatch.sample_indices,
        inputs=inputs,
        rows=HeadRows.of(targets),
        token_count=targets.token_count,
        work=work_of(whole, microbatch.targets, attention),
        counted_tokens=microbatch.targets.token_count,
        fingerprint=microbatch.fingerprint,
    )


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
        attention: AttentionPattern,
        forms: MaskForms,
        parallel: ParallelState,
    ) -> None:
        self.samples = samples
        self._objective = objective
        self._noise = noise
        self._micro_batch_size = micro_batch_size
        self._data_rank, self._data_size = parallel.data_rank, parallel.data_size
        self._share = attention, forms, parallel.context_rank, parallel.context_size

    def __call__(self, address: BatchAddress) -> list[ReadyMicrobatch]:
        """This rank's microbatches of a global batch, on the CPU."""
        positions = microbatch_positions(
            address.first_sample,
            global_batch_size=address.size,
            micro_batch_size=self._micro_batch_size,
            data_rank=self._data_rank,
            data_size=self._data_size,
        )
        return [ready(microbatch, *self._share) for microbatch in self.at(address, positions)]

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


def transfer(
    batches: Iterator[list[ReadyMicrobatch]], loader: Loader, device: torch.device
) -> Iterator[list[ReadyMicrobatch]]:
    """Bring batches to their device while earlier ones are worked on.

    Args:
        batches: on the CPU.
        loader: pinned or dali.
        device: of the rank.

    Yields:
        The same batches on the device; one's tensors are overwritten once the next is asked for.
    """
    waiting: deque[bytes] = deque()

    def tensors() -> Iterator[list[Tensor]]:
        for microbatches in batches:
            pickled, found = without_tensors(microbatches)
            waiting.append(pickled)
            yield found

    transfers = {"dali": transfer_with_dali, "pinned": transfer_from_pinned_memory}
    for transferred in transfers[loader](tensors(), device):
        yield with_tensors(waiting.popleft(), transferred)
