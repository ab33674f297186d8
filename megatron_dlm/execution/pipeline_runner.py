"""One pass of a global batch through megatron-core's schedules; only this file knows their contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megatron_dlm.execution.microbatches import TIME_BANDS, BatchAddress, Microbatch, ReadyMicrobatch, ready
from megatron_dlm.families.base import Objective
from megatron_dlm.interfaces import TrainingError
from megatron_dlm.models.flops.flops_actual import Work
from megatron_dlm.models.visibility import MaskForms
from megatron_dlm.platform.gpu import ACTIVATION_CURES, allocating, sent, waiting_for_gpu
from megatron_dlm.platform.parallel import ParallelState


@dataclass(frozen=True)
class BatchSums:
    """Sums over one global batch, equal on all ranks."""

    loss: float
    """Sum of weight * token loss, in nats for weight 1."""
    bound: float
    """Sum of the NELBO (AR: NLL) over the tokens, in nats."""
    tokens: int
    work: Work
    """Work that the network and the head really did, from which FLOPs are counted."""
    fingerprint: int
    """Digest of the batch's corruption; does not depend on the layout."""
    bad_samples: tuple[int, ...] = ()
    """Positions in the run of samples whose microbatch has a loss that is not finite."""
    sample_bounds: NDArray[np.float64] | None = None
    """float64 [samples of the batch], NELBO of each sample in nats, summed over tokens; None in training."""
    votes: tuple[bool, ...] = ()
    """Whether any rank has cast each vote."""
    band_nats: tuple[float, ...] = ()
    """Sum of the NELBO of the samples whose diffusion time is in each of TIME_BANDS equal bands, in nats;
    empty for families without one time a sample, and in evaluations."""
    reports: NDArray[np.int64] | None = None
    """int64 [ranks, numbers], what each rank has reported; None: nothing."""


class PipelineRunner:
    """Runs global batches of one objective through the stage this process holds.

    Losses are summed over tokens; megatron-core divides the gradient once, by the global batch's tokens.
    """

    def __init__(
        self,
        chunks: list[Any],
        objective: Objective,
        parallel: ParallelState,
        head_rows_per_chunk: int | None,
    ) -> None:
        """`chunks`: what this process holds of the model, wrapped for data parallelism or not."""
        self._chunks = chunks
        last = chunks[-1]
        self._denoiser = last.module if hasattr(last, "ddp_config") else last
        self.objective = objective
        self._parallel = parallel
        self._rows_per_chunk = head_rows_per_chunk

    @property
    def mask_forms(self) -> MaskForms:
        """Forms of masks that the layers' attention takes."""
        forms: MaskForms = self._denoiser.config.mask_forms
        return forms

    def ready(self, microbatches: Iterable[Microbatch]) -> list[ReadyMicrobatch]:
        """Reduce microbatches that are not from a `MicrobatchMaker` to the part that this rank reads."""
        attention, parallel = self._denoiser.attention, self._parallel
        return [
            ready(microbatch, attention, self.mask_forms, parallel.context_rank, parallel.context_size)
            for microbatch in microbatches
        ]

    def run(
        self,
        microbatches: Sequence[ReadyMicrobatch],
        address: BatchAddress,
        votes: Sequence[Callable[[], bool]] = (),
        report: Sequence[int] = (),
    ) -> BatchSums:
        """Run forward, and if `address.training` backward, of one global batch; all ranks call it.

        Args:
            microbatches: this rank's microbatches of the global batch.
            address: address of the global batch.
            votes: functions that return this rank's votes, equally many on all ranks; called once the passes
                are queued, and summed over ranks together with the other sums.
            report: whole numbers that all ranks get to know from each other, equally many on all ranks.

        Returns:
            Sums over the global batch.

        Raises:
            TrainingError: a loss of an evaluation is not finite.
        """
        shapes = {microbatch.inputs.token_ids_BL.shape for microbatch in microbatches}
        batch_size, own_length = microbatches[0].inputs.token_ids_BL.shape
        # megatron-core divides it by the context parallel size.
        length = own_length * self._parallel.context_size
        config, stages = self._denoiser.config, self._parallel.pipeline_size
        config.variable_seq_lengths = len(shapes) > 1
        # Microbatches that a chunk takes before the next one's turn; groups must come out even.
        even = len(microbatches) % stages == 0
        config.microbatch_group_size_per_vp_stage = stages if even else len(microbatches)
        for chunk in self._chunks:
            chunk.train(address.training)
        with (
            torch.set_grad_enabled(address.training),
            allocating("the activations of a microbatch", ACTIVATION_CURES),
        ):
            outputs = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                # Every chunk reads every microbatch; without chunks megatron-core takes the one iterator.
                data_iterator=[iter(microbatches) for _ in self._chunks],
                model=self._chunks,
                num_microbatches=len(microbatches),
                seq_length=length,
                micro_batch_size=batch_size,
                forward_only=not address.training,
            )
        return self._reduce(outputs, microbatches, address, votes, report)

    def _forward_step(
        self, microbatches: Iterator[ReadyMicrobatch], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        microbatch = next(microbatches)

        def loss_of(hidden_states: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            with allocating(
                "the logits of a chunk of rows",
                "lower training.head_rows_per_chunk or training.micro_batch_size",
            ):
                losses = self._denoiser.head(
                    hidden_states, microbatch.rows, self.objective.loss_and_dlogits, self._rows_per_chunk
                )
            # Filled in on the device, which copying from the CPU would wait for.
            tokens = torch.full((), microbatch.token_count, dtype=torch.int, device=hidden_states.device)
            # Cloned: the schedule may change what it was given in place.
            sums = {"sums": torch.stack([losses.loss.detach().double(), losses.bound])}
            if not model.training:
                sums["sample_bounds"] = losses.sample_bounds()
            elif microbatch.bands_B is not None:
                bands = torch.zeros(TIME_BANDS, dtype=torch.float64, device=hidden_states.device)
                bands.index_add_(0, microbatch.bands_B.to(bands.device), losses.sample_bounds())
                sums["sums"] = torch.cat([sums["sums"], bands])
            return losses.loss, tokens, sums

        return model(microbatch.inputs.to(self._parallel.device)), loss_of

    def _reduce(
        self,
        outputs: list[dict[str, Tensor]],
        microbatches: Sequence[ReadyMicrobatch],
        address: BatchAddress,
        votes: Sequence[Callable[[], bool]],
        report: Sequence[int],
    ) -> BatchSums:
        parallel = self._parallel
        counts = self._counts(microbatches, votes, report)
        bands = TIME_BANDS if address.training and microbatches[0].bands_B is not None else 0
        mine = torch.zeros(len(microbatches), 2 + bands, dtype=torch.float64, device=parallel.device)
        if parallel.is_last_stage:
            mine += torch.stack([output["sums"] for output in outputs])
        sums = mine.sum(dim=0)
        if parallel.is_last_stage:
            dist.all_reduce(sums, group=parallel.replica_group)
        last_stage = dist.get_global_rank(parallel.pipeline_group, parallel.pipeline_size - 1)
        dist.broadcast(sums, src=last_stage, group=parallel.pipeline_group)
        with waiting_for_gpu("the sums of a batch"):
            # The bits of all numbers at once.
            packed = torch.cat([sums.view(torch.int64), counts]).tolist()
        loss, bound, *band_nats = np.array(packed[: len(sums)]).view(np.float64).tolist()
        fingerprint, tokens, *numbers = packed[len(sums) :]
        bad_samples: tuple[int, ...] = ()
        if not (math.isfinite(loss) and math.isfinite(bound)):
            bad_samples = self._samples_at_fault(mine, microbatches, address)
            if not address.training:
                raise TrainingError(
                    f"loss: not finite in validation batch {address.step + 1}, samples {list(bad_samples)}"
                )
        sample_bounds = None if address.training else self._sample_bounds(outputs, microbatches, address)
        of_work = len(Work().numbers)
        work, cast = Work(*numbers[:of_work]), tuple(map(bool, numbers[of_work : of_work + len(votes)]))
        told = numbers[of_work + len(votes) :]
        reports = np.array(told).reshape(parallel.world_size, len(report)) if report else None
        return BatchSums(
            loss,
            bound,
            tokens,
            work,
            fingerprint % 2**63,
            bad_samples,
            sample_bounds,
            cast,
            tuple(band_nats),
            reports,
        )

    def _counts(
        self,
        microbatches: Sequence[ReadyMicrobatch],
        votes: Sequence[Callable[[], bool]],
        report: Sequence[int],
    ) -> Tensor:
        """int64: fingerprint, tokens, work of the global batch, votes cast, and a place for each report."""
        parallel = self._parallel
        fingerprint, tokens, work = 0, 0, Work()
        if parallel.tensor_rank == parallel.pipeline_rank == parallel.context_rank == 0:
            # Ranks that share its samples have the same.
            for microbatch in microbatches:
                fingerprint += microbatch.fingerprint
                tokens += microbatch.counted_tokens
                work += microbatch.work
        numbers = [fingerprint % 2**63, tokens, *work.numbers, *(int(vote()) for vote in votes)]
        reports = torch.zeros(parallel.world_size, len(report), dtype=torch.int64)
        reports[parallel.rank] = torch.tensor(report, dtype=torch.int64)
        both = torch.cat([torch.tensor(numbers, dtype=torch.int64), reports.flatten()])
        counts = sent(both, parallel.device)
        dist.all_reduce(counts)
        return counts

    def _sample_bounds(
        self,
        outputs: list[dict[str, Tensor]],
        microbatches: Sequence[ReadyMicrobatch],
        address: BatchAddress,
    ) -> NDArray[np.float64]:
        """The bound of each sample of the batch, in nats, on all ranks; all ranks call it."""
        parallel = self._parallel
        bounds = torch.zeros(address.size, dtype=torch.float64, device=parallel.device)
        if parallel.is_last_stage:
            for output, microbatch in zip(outputs, microbatches, strict=True):
                places = torch.from_numpy(microbatch.sample_indices - address.first_sample)
                bounds[places.to(parallel.device)] += output["sample_bounds"]
            dist.all_reduce(bounds, group=parallel.replica_group)
        last_stage = dist.get_global_rank(parallel.pipeline_group, parallel.pipeline_size - 1)
        dist.broadcast(bounds, src=last_stage, group=parallel.pipeline_group)
        found: NDArray[np.float64] = bounds.cpu().numpy()
        return found

    def _samples_at_fault(
        self, mine: Tensor, microbatches: Sequence[ReadyMicrobatch], address: BatchAddress
    ) -> tuple[int, ...]:
        """All ranks' samples whose microbatch has sums that are not finite; all ranks call it."""
        parallel = self._parallel
        flags = torch.zeros(address.size, dtype=torch.int64, device=parallel.device)
        for sums, microbatch in zip(mine.tolist(), microbatches, strict=True):
            if not all(map(math.isfinite, sums[:2])):
                flags[torch.from_numpy(microbatch.sample_indices - address.first_sample)] = 1
        for group in (parallel.replica_group, parallel.pipeline_group):
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        # A sum of finite losses may overflow: then all are at fault.
        found = flags.nonzero()[:, 0] if bool(flags.any()) else torch.arange(address.size)
        return tuple((found + address.first_sample).tolist())
