"""Makes a rank's microbatches of a global batch: reads, corrupts and cuts them to what the network needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

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

TIME_BANDS = 4
"""Equal bands of the diffusion time whose training losses are reported by themselves."""
TimeBands = Callable[[NDArray[np.int64], CorruptionContext, int], NDArray[np.int64] | None]


@dataclass(frozen=True)
class BatchAddress:
    """Identifies one global batch of a run or of an evaluation."""

    step: int
    """Optimizer steps (in an evaluation: batches) before this batch."""
    first_sample: int
    """Position in the run of the batch's first sample."""
    size: int
    """Samples in the batch, over all processes."""
    training: bool
    """Whether the batch is trained on; if False, only the likelihood bound is computed."""

    def context(self, noise: NoiseSource) -> CorruptionContext:
        """Context that addresses the batch's random draws from `noise`."""
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
    """Part of a microbatch that this rank's forward pass and loss read; its tensors may be on any device."""

    sample_indices: NDArray[np.int64]
    """int64 [B], positions in the run."""
    inputs: ModelInputs
    """Inputs at this context parallel rank's positions."""
    rows: HeadRows
    """Rows at these positions that reach the head."""
    token_count: int
    """Number of tokens in this rank's share of the loss."""
    work: Work
    """Work of all context parallel ranks together, from which FLOPs are counted."""
    counted_tokens: int
    """Number of tokens in the loss of all context parallel ranks together."""
    fingerprint: int
    """Digest of the samples' corruption."""
    bands_B: Tensor | None = None
    """int64 [B], band of the diffusion time of each sample, whose loss is then reported by itself."""


def ready(
    microbatch: Microbatch,
    attention: AttentionPattern,
    forms: MaskForms,
    context_rank: int,
    context_size: int,
) -> ReadyMicrobatch:
    """Reduce a microbatch to the part that this context parallel rank reads.

    Args:
        microbatch: microbatch on the CPU.
        attention: attention pattern of the family.
        forms: forms of masks that the layers' attention accepts.
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
        bands: TimeBands | None = None,
    ) -> None:
        """`bands`: as `ObjectiveConfig.time_bands`; None: losses are not reported by time."""
        self.samples = samples
        self._bands = bands
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
        context = address.context(self._noise)
        return [
            replace(ready(microbatch, *self._share), bands_B=self._bands_of(microbatch, context))
            for microbatch in self.at(address, positions)
        ]

    def _bands_of(self, microbatch: Microbatch, context: CorruptionContext) -> Tensor | None:
        if self._bands is None:
            return None
        bands = self._bands(microbatch.sample_indices, context, TIME_BANDS)
        return None if bands is None else torch.from_numpy(bands)

    def at(self, address: BatchAddress, positions: Iterable[NDArray[np.int64]]) -> list[Microbatch]:
        """Read and corrupt some samples of a global batch.

        Args:
            address: address of the global batch.
            positions: for each microbatch int64 [B], positions of its samples in the run.

        Returns:
            At least one microbatch for each array of positions.
        """
        batches = map(self.samples.read, positions)
        return corrupted_parts(self._objective, batches, address.context(self._noise))


def transfer(
    batches: Iterator[list[ReadyMicrobatch]], loader: Loader, device: torch.device
) -> Iterator[list[ReadyMicrobatch]]:
    """Copy batches to the device, overlapped with computation on earlier batches.

    Args:
        batches: batches on the CPU, each a list of microbatches.
        loader: transfer method, pinned or dali.
        device: device of the rank.

    Yields:
        The same batches on the device; a batch's tensors are overwritten when the next batch is requested.
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
