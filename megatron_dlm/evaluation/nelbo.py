"""NELBO of a model on held-out data: chooses sequences, draws noisy copies, scores them.

The noisy copies of one sequence form global batches of their own, so the sequence's index addresses their
draws: the result does not depend on the micro-batch size, the layout or the other sequences scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dlm.data.loading.data_config import microbatch_positions
from megatron_dlm.data.loading.packing import Rows
from megatron_dlm.diffusion.context import CorruptionContext
from megatron_dlm.diffusion.time_sampling import batch_strata
from megatron_dlm.evaluation.exported_scoring import ExportedBounds
from megatron_dlm.evaluation.nelbo_statistics import Bound, BoundConfig, check_copies, summarise
from megatron_dlm.execution.microbatches import BatchAddress, corrupted_parts
from megatron_dlm.families.base import Objective, ObjectiveConfig
from megatron_dlm.families.documents import corrupt
from megatron_dlm.interfaces import InputError, TokenBatch, Vocabulary
from megatron_dlm.platform.peers import Peers
from megatron_dlm.platform.rng import NoiseSource, Permutation

if TYPE_CHECKING:
    from megatron_dlm.execution.pipeline_runner import PipelineRunner

DEFAULT_SEQUENCES = 128
EARLY_SHARE = 4
"""For every this many copies of a sequence, one extra copy is drawn at a time below time_epsilon."""


RunCopies = Callable[[ObjectiveConfig, Sequence[TokenBatch], CorruptionContext], NDArray[np.float64]]
"""Nats of each sample of one global batch, float64 [K], from this rank's microbatches; all ranks call it."""
ProgressCallback = Callable[[int, int], None]
"""Callback with the number of sequences done and in total."""


def held_out_bound(
    run: RunCopies,
    rows: Rows,
    objective: ObjectiveConfig,
    vocabulary: Vocabulary,
    config: BoundConfig,
    *,
    bytes_per_token: float,
    share: RankShare,
    progress: ProgressCallback = lambda done, total: None,
) -> Bound:
    """Estimate the NELBO of a model on held-out sequences.

    Args:
        run: function that scores noisy copies with the model.
        rows: held-out sequences to choose from.
        objective: configuration of the model's family.
        vocabulary: token ids of the model.
        config: number of sequences and of noisy copies.
        bytes_per_token: UTF-8 bytes of text per token.
        share: which copies of a global batch this rank scores.
        progress: callback with the sequences done and in total.

    Returns:
        The estimate, equal on all ranks.

    Raises:
        InputError: more sequences than the data has, or a number of copies that the family cannot divide.
    """
    scorer = _Scorer(run, rows, objective, vocabulary, config, share)
    count = config.num_sequences or min(DEFAULT_SEQUENCES, rows.num_rows)
    if count > rows.num_rows:
        raise InputError(f"num_sequences: {count} exceed the {rows.num_rows} sequences of the data")
    order = Permutation(rows.num_rows, scorer.noise, "sequences", 0)
    chosen = order(np.arange(count))
    check_copies(objective, config.num_times, rows.read(chosen[:1]).shape[1] - 1)
    tokens = np.array([scorer.tokens(row) for row in chosen])
    if not objective.has_times:
        bounds, strata, early = scorer.exact(chosen, progress)[:, None, None], None, None
    else:
        bounds, strata, early = scorer.noisy(chosen, progress)
    return summarise(
        bounds,
        tokens,
        early_N=early,
        strata_NRK=strata if objective.has_loss_by_time else None,
        time_epsilon=objective.min_time,
        prior_nats=objective.prior_nats(vocabulary),
        bytes_per_token=bytes_per_token,
    )


class _Scorer:
    """Scores chosen sequences, a global batch of copies at a time."""

    def __init__(
        self,
        run: RunCopies,
        rows: Rows,
        objective: ObjectiveConfig,
        vocabulary: Vocabulary,
        config: BoundConfig,
        share: RankShare,
    ) -> None:
        self._run = run
        self._rows = rows
        self._objective = objective
        self._built = objective.build(vocabulary)
        self._config = config
        self._share = share
        self.noise = NoiseSource(config.seed, "held-out")

    def tokens(self, row: int) -> int:
        """Number of scored tokens of a sequence."""
        alone = BatchAddress(0, 0, 1, training=False).context(self.noise)
        batch = self._read(np.array([row]), np.zeros(1, np.int64))
        return corrupt(self._built, batch, alone)[1].token_count

    def exact(self, chosen: NDArray[np.int64], progress: ProgressCallback) -> NDArray[np.float64]:
        """Exact NLL of families without noise, float64 [N] nats; a batch then holds different sequences."""
        size, found = self._config.num_times, []
        for start in range(0, len(chosen), size):
            some = chosen[start : start + size]
            # The last batch is filled up, so that it divides among processes as the others do.
            filled = np.resize(some, size)
            address = BatchAddress(0, start, size, training=False)
            batches = [
                self._read(filled[places - start], places) for places in self._share.positions(address)
            ]
            bounds = self._run(self._objective, batches, address.context(self.noise))
            found.append((bounds / self._share.times_scored(size))[: len(some)])
            progress(start + len(some), len(chosen))
        return np.concatenate(found)

    def noisy(
        self, chosen: NDArray[np.int64], progress: ProgressCallback
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        """Nats and strata of the copies, [N, R, K] each, and the mean of the early integrand, [N]."""
        copies, replicates = self._config.num_times, self._config.replicates
        bounds = np.empty((len(chosen), replicates, copies))
        strata = np.empty(bounds.shape, dtype=np.int64)
        early = np.zeros(len(chosen))
        for number, row in enumerate(chosen):
            for replicate in range(replicates):
                first = (number * replicates + replicate) * copies
                address = BatchAddress(0, first, copies, training=False)
                context = address.context(self.noise)
                bounds[number, replicate] = self._copies(self._objective, row, address, context)
                places = first + np.arange(copies)
                strata[number, replicate] = batch_strata(places, context, "scrambled")[:, 0]
            early[number] = self._early(number, row)
            progress(number + 1, len(chosen))
        return bounds, strata, early

    def _early(self, number: int, row: int) -> float:
        """Mean of the NELBO's integrand, in nats, at times below the protocol's smallest time."""
        objective, latest = self._objective, self._objective.min_time
        if not latest:
            return 0.0
        copies = self._config.num_times
        # A part without times is in the integrand as a whole, and takes its share of the copies.
        if not objective.has_parts:
            copies = max(1, copies // EARLY_SHARE)
        address = BatchAddress(0, number * copies, copies, training=False)
        noise = NoiseSource(self._config.seed, "held-out-early")
        context = replace(address.context(noise), time_range=(0.0, latest))
        return float(self._copies(objective, row, address, context).mean())

    def _copies(
        self, objective: ObjectiveConfig, row: int, address: BatchAddress, context: CorruptionContext
    ) -> NDArray[np.float64]:
        batches = [self._read(np.full(len(places), row), places) for places in self._share.positions(address)]
        return self._run(objective, batches, context) / self._share.times_scored(address.size)

    def _read(self, indices: NDArray[np.int64], positions: NDArray[np.int64]) -> TokenBatch:
        documents, loss_mask = self._rows.read_documents(indices), self._rows.read_loss_mask(indices)
        return TokenBatch(
            token_ids=torch.from_numpy(self._rows.read(indices)),
            sample_indices=positions,
            document_ids=None if documents is None else torch.from_numpy(documents),
            loss_mask=None if loss_mask is None else torch.from_numpy(loss_mask),
        )


def megatron_copies(runner_of: Callable[[Objective], PipelineRunner], vocabulary: Vocabulary) -> RunCopies:
    """Build the function that scores noisy copies with the trainer's model, on any parallel layout.

    Args:
        runner_of: function from an objective to a runner of the model.
        vocabulary: token ids of the model.

    Returns:
        Function that scores the noisy copies of a global batch.
    """
    runners: dict[ObjectiveConfig, PipelineRunner] = {}

    def run(
        config: ObjectiveConfig, batches: Sequence[TokenBatch], context: CorruptionContext
    ) -> NDArray[np.float64]:
        if config not in runners:
            runners[config] = runner_of(config.build(vocabulary))
        runner = runners[config]
        address = BatchAddress(0, context.batch_start, context.global_batch_size, training=False)
        microbatches = runner.ready(corrupted_parts(runner.objective, batches, context))
        bounds = runner.run(microbatches, address).sample_bounds
        assert bounds is not None
        return bounds

    return run


def exported_copies(score: ExportedBounds, vocabulary: Vocabulary, peers: Peers = Peers()) -> RunCopies:
    """Build the function that scores noisy copies with an exported model.

    Args:
        score: scorer of the exported model.
        vocabulary: token ids of the model.
        peers: processes that have loaded the same model and score the other copies of a global batch.

    Returns:
        Function that scores the noisy copies of a global batch.
    """

    def run(
        config: ObjectiveConfig, batches: Sequence[TokenBatch], context: CorruptionContext
    ) -> NDArray[np.float64]:
        objective = config.build(vocabulary)
        bounds = np.zeros(context.global_batch_size)
        for microbatch in corrupted_parts(objective, batches, context):
            places = microbatch.sample_indices - context.batch_start
            bounds[places] += score(microbatch.inputs, microbatch.targets, objective)
        # Each process has zeros for what others score.
        return np.sum(peers.all_gather_objects(bounds), axis=0)

    return run


@dataclass(frozen=True)
class RankShare:
    """Which copies of a global batch one rank scores; all ranks score equally many.

    Where copies are fewer than ranks, or do not divide among them, the first ones are scored again.
    """

    micro_batch_size: int
    """Most noisy copies per forward pass."""
    data_rank: int = 0
    data_size: int = 1

    def positions(self, address: BatchAddress) -> list[NDArray[np.int64]]:
        """Sample positions of this rank's microbatches.

        Args:
            address: address of the global batch.

        Returns:
            For each microbatch int64 [B].
        """
        filled = self._filled(address.size)
        own = filled // self.data_size
        size = max(s for s in range(1, self.micro_batch_size + 1) if own % s == 0)
        places = microbatch_positions(
            0,
            global_batch_size=filled,
            micro_batch_size=size,
            data_rank=self.data_rank,
            data_size=self.data_size,
        )
        return [address.first_sample + each % address.size for each in places]

    def times_scored(self, size: int) -> NDArray[np.int64]:
        """How often each copy of a global batch is scored by all ranks together.

        Args:
            size: copies in the batch.

        Returns:
            int64 [size].
        """
        return np.bincount(np.arange(self._filled(size)) % size, minlength=size)

    def _filled(self, size: int) -> int:
        return -(-size // self.data_size) * self.data_size
