"""One pass of a global batch through megatron-core's schedules; only this file knows their contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_dlm.interfaces import ModelInputs, Targets, TokenBatch
from megatron_dlm.objectives.base import CorruptionContext, Objective, corruption_fingerprint
from megatron_dlm.platform.parallel import ParallelState


@dataclass(frozen=True)
class BatchSums:
    """Sums over one global batch, equal on all ranks."""

    loss: float
    """Sum of weight * token loss, in nats for weight 1."""
    bound: float
    """Sum of the NELBO (AR: NLL) over the tokens, in nats."""
    tokens: int
    fingerprint: int
    """Digest of the batch's corruption; does not depend on the layout."""


@dataclass
class _Tally:
    """What one rank adds up over its microbatches."""

    fingerprint: int = 0


class PipelineRunner:
    """Runs global batches of one objective through the stage this process holds.

    Losses are summed over tokens; megatron-core divides the gradient once, by the global batch's tokens.
    """

    def __init__(
        self, model: Any, objective: Objective, parallel: ParallelState, head_rows_per_chunk: int
    ) -> None:
        self._model = model
        self._denoiser = model.module if hasattr(model, "ddp_config") else model
        self._objective = objective
        self._parallel = parallel
        self._rows_per_chunk = head_rows_per_chunk

    def run(
        self,
        batches: Iterator[TokenBatch],
        context: CorruptionContext,
        *,
        micro_batch_size: int,
        seq_length: int,
    ) -> BatchSums:
        """Forward, and backward where `context.training`, of one global batch; all ranks call it.

        Args:
            batches: this rank's microbatches of the global batch.
            context: address of the batch's draws.
            micro_batch_size: samples of each microbatch.
            seq_length: tokens of a sample.

        Returns:
            Sums over the global batch.
        """
        tally = _Tally()
        samples_of_rank = context.global_batch_size // self._parallel.data_size
        self._model.train(context.training)
        with torch.set_grad_enabled(context.training):
            outputs = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=self._prepare(batches, context, tally),
                model=[self._model],
                num_microbatches=samples_of_rank // micro_batch_size,
                seq_length=seq_length,
                micro_batch_size=micro_batch_size,
                forward_only=not context.training,
            )
        return self._reduce(outputs, tally)

    def _prepare(
        self, batches: Iterator[TokenBatch], context: CorruptionContext, tally: _Tally
    ) -> Iterator[tuple[ModelInputs, Targets]]:
        """Corrupt on the CPU, then move to the device; every stage does, and gets the same."""
        device = self._parallel.device
        for batch in batches:
            inputs, targets = self._objective.corrupt(batch, context)
            tally.fingerprint += corruption_fingerprint(inputs, targets, batch)
            yield replace(inputs, **{name: value.to(device) for name, value in vars(inputs).items()}), targets

    def _forward_step(
        self, batches: Iterator[tuple[ModelInputs, Targets]], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        inputs, targets = next(batches)

        def loss_of(hidden_states: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, bound = self._denoiser.head.losses(
                hidden_states, targets, self._objective.loss_and_dlogits, self._rows_per_chunk
            )
            tokens = torch.tensor(targets.token_count, dtype=torch.int, device=loss.device)
            # Cloned: the schedule may change what it was given in place.
            sums = torch.stack([loss.detach().double(), bound, tokens.double()])
            return loss, tokens, {"sums": sums}

        return model(inputs), loss_of

    def _reduce(self, outputs: list[dict[str, Tensor]], tally: _Tally) -> BatchSums:
        parallel = self._parallel
        sums = torch.zeros(3, dtype=torch.float64, device=parallel.device)
        if parallel.is_last_stage:
            sums += torch.stack([output["sums"] for output in outputs]).sum(dim=0)
            dist.all_reduce(sums, group=parallel.data_group)
        last_stage = dist.get_global_rank(parallel.pipeline_group, parallel.pipeline_size - 1)
        dist.broadcast(sums, src=last_stage, group=parallel.pipeline_group)
        fingerprint = torch.tensor(tally.fingerprint % 2**63, dtype=torch.int64, device=parallel.device)
        dist.all_reduce(fingerprint, group=parallel.data_group)
        loss, bound, tokens = sums.tolist()
        return BatchSums(loss, bound, int(tokens), int(fingerprint) % 2**63)
