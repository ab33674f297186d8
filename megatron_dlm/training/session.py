"""Everything a run needs, built once in order: model, optimizer, runner."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dlm.data.loading.blending import PlanSegment, SampleReader
from megatron_dlm.data.loading.prefetch import Prefetcher
from megatron_dlm.evaluation.validation import Likelihood, estimate_likelihood
from megatron_dlm.execution.microbatches import BatchAddress, MicrobatchMaker, transfer
from megatron_dlm.execution.pipeline_runner import BatchSums, PipelineRunner
from megatron_dlm.families.schedules import objective_phases, training_objective
from megatron_dlm.models.initialization import initialize
from megatron_dlm.models.precision.fp8_emulation import follow_maxima
from megatron_dlm.platform.gpu import STATE_CURES, allocating, peak_memory_bytes
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.platform.rng import NoiseSource
from megatron_dlm.platform.stopwatch import Stopwatch
from megatron_dlm.run.config import EvaluationConfig, RunConfig
from megatron_dlm.run.datasets import BlendedShards, RunData
from megatron_dlm.run.model import build_denoiser
from megatron_dlm.training.optimizer import build_optimizer, finish_gradients, wrap_data_parallel


class Validation:
    """Runs evaluation batches of one model: always the same blocks, times and noise."""

    def __init__(
        self,
        runner: PipelineRunner,
        shards: BlendedShards,
        bytes_per_token: float,
        config: RunConfig,
        parallel: ParallelState,
    ) -> None:
        noise = NoiseSource(config.evaluation.seed, "validation")
        # Random here too: the first blocks of a shard are a few documents, not the whole of it.
        samples = SampleReader([PlanSegment(0, shards.blend)], shards.rows, noise)
        objective, size = runner.objective, config.training.micro_batch_size
        self._runner = runner
        self._make = MicrobatchMaker(
            samples, objective, noise, size, config.objective.attention, runner.mask_forms, parallel
        )
        self._bytes_per_token = bytes_per_token

    def run(self, config: EvaluationConfig) -> Likelihood:
        """The bound over `config.num_batches` batches; all ranks call it."""

        def run_batch(index: int) -> tuple[float, int]:
            first, size = index * config.batch_size, config.batch_size
            address = BatchAddress(index, first, size, training=False)
            sums = self._runner.run(self._make(address), address)
            return sums.bound, sums.tokens

        return estimate_likelihood(run_batch, config.num_batches, self._bytes_per_token)


class Session:
    """A run's model, optimizer and data on this process."""

    def __init__(self, config: RunConfig, data: RunData, parallel: ParallelState) -> None:
        self.config = config
        self.data = data
        self.parallel = parallel
        with allocating("the model's weights", STATE_CURES):
            self.denoiser = build_denoiser(config, data.vocabulary, parallel)
            initialize(self.denoiser, parallel, config.training.seed)
        with allocating("the gradients", STATE_CURES):
            self.chunks = wrap_data_parallel(self.denoiser, config.parallel)
        with allocating("the optimizer's main weights", STATE_CURES):
            self.optimizer = build_optimizer(
                config.optimizer, config.parallel, config.training.precision, self.chunks
            )
        self._runner = PipelineRunner(
            self.chunks,
            training_objective(config.objective, data.vocabulary),
            parallel,
            config.training.head_rows_per_chunk,
        )
        self.validation = Validation(
            self._runner, data.validation, data.validation_bytes_per_token, config, parallel
        )
        self._noise = NoiseSource(config.training.seed)
        self.own_time = Stopwatch(parallel.device)
        """From the start of a training batch's passes to the exchange of its gradients, on this rank."""
        self._data_seconds = 0.0
        self.rank_reports: list[NDArray[np.int64]] = []
        """Reports [ranks, 3] of the steps since the last line of metrics, but the newest: microseconds of a
        rank's own passes and of its waiting for data, and bytes of its memory."""
        self.votes: dict[str, Callable[[], bool]] = {}
        """Yes/no questions, by name, that ranks answer in each training batch; same names on all ranks."""
        self.agreed: dict[str, bool] = {}
        """For each vote, whether any rank answered yes in the last training batch."""
        self.plan = (PlanSegment(0, data.train.blend),)
        """Segments of the run, each with the blend of shards that is read from its first sample on."""
        self._read_by_plan()
        self._connect()

    def _read_by_plan(self) -> None:
        samples = SampleReader(self.plan, self.data.train.rows, self._noise)
        config, parallel = self.config, self.parallel
        objective, size = self._runner.objective, config.training.micro_batch_size
        forms = self.denoiser.config.mask_forms
        # Samples of a second part have no time of the first one's, and bands are parts of all times.
        phases = objective_phases(config.objective).values()
        in_bands = not any(phase.has_parts or phase.training_times for phase in phases)
        self._make = MicrobatchMaker(
            samples,
            objective,
            self._noise,
            size,
            config.objective.attention,
            forms,
            parallel,
            config.objective.time_bands if in_bands else None,
        )
        loader = config.data.loader_for(parallel.device.type)
        self._batches = Prefetcher(
            self._make,
            self._following,
            workers=config.data.workers,
            transfer=None if loader == "torch" else partial(transfer, loader=loader, device=parallel.device),
        )

    def _address(self, step: int, first_sample: int) -> BatchAddress:
        size = self.config.training.batch_size_at(first_sample)
        return BatchAddress(step, first_sample, size, training=True)

    def _following(self, address: BatchAddress) -> BatchAddress:
        return self._address(address.step + 1, address.first_sample + address.size)

    def stop_reading(self) -> None:
        """End the processes that read ahead."""
        self._batches.close()

    def follow(self, plan: Sequence[PlanSegment], consumed_samples: int) -> None:
        """Continue with a checkpoint's data plan; if the blend has changed, the new one applies from here on.

        Args:
            plan: segments of the run so far.
            consumed_samples: samples that the run has read so far.
        """
        blend = self.data.train.blend
        changed = () if plan[-1].blend == blend else (PlanSegment(consumed_samples, blend),)
        self.plan = (*plan, *changed)
        self.stop_reading()
        self._read_by_plan()

    def epochs(self, consumed_samples: int) -> dict[str, float]:
        """How often each training shard has been read."""
        return self._make.samples.epochs(consumed_samples)

    def _connect(self) -> None:
        """Tell megatron-core's schedules how gradients are finished and scaled."""

        def finish(*arguments: Any, **options: Any) -> None:
            # From here on a rank waits for the others.
            self.own_time.stop()
            finish_gradients(*arguments, **options)

        self.denoiser.config.finalize_model_grads_func = finish
        if self.config.parallel.overlap_grad_reduce:
            # Nothing is sent before a step's last microbatch.
            waits = [chunk.no_sync for chunk in self.chunks]
            self.denoiser.config.no_sync_func = waits if len(waits) > 1 else waits[0]
        self.denoiser.config.grad_scale_func = self.optimizer.scale_loss

    def run_batch(self, step: int, first_sample: int) -> BatchSums:
        """Forward and backward of the global batch that starts at `first_sample`; gradients are left ready.

        Args:
            step: optimizer steps done.
            first_sample: samples consumed before this step.

        Returns:
            Sums over the global batch, equal on all ranks.
        """
        self._forget_gradients()
        address = self._address(step, first_sample)
        # What is known of the step before travels with this one's sums.
        seconds = self.own_time.seconds(), self._data_seconds
        report = [*(round(1e6 * each) for each in seconds), peak_memory_bytes(self.parallel.device)]
        started = time.monotonic()
        batch = self._batches.get(address)
        self._data_seconds = time.monotonic() - started
        self.own_time.start()
        sums = self._runner.run(batch, address, list(self.votes.values()), report)
        if sums.reports is not None and report[0]:
            self.rank_reports.append(sums.reports)
        self.agreed = dict(zip(self.votes, sums.votes, strict=True))
        follow_maxima(self.denoiser, self.parallel.stage_group)
        return sums

    def run_sample(self, step: int, first_sample: int, position: int) -> BatchSums:
        """Forward and backward of one sample of a training batch, on one process.

        Args:
            step: optimizer steps before the batch.
            first_sample: position in the run of the batch's first sample.
            position: position of the sample in the run.

        Returns:
            Sums over the sample.
        """
        self._forget_gradients()
        address = self._address(step, first_sample)
        microbatches = self._make.at(address, [np.array([position])])
        return self._runner.run(self._runner.ready(microbatches), address)

    def _forget_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def corrupted(
        self, step: int, first_sample: int, positions: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Some samples of a training batch as the network sees them.

        Args:
            step: optimizer steps done before the batch.
            first_sample: position in the run of the batch's first sample.
            positions: int64 [n], positions of the samples in the run.

        Returns:
            For each position its clean tokens and the tensors of its inputs and targets, by name.
        """
        address = self._address(step, first_sample)
        arrays: dict[str, NDArray[Any]] = {}
        for position in positions:
            where = np.array([position])
            (microbatch,) = self._make.at(address, [where])
            clean = self._make.samples.read(where).token_ids
            tensors = {"clean_token_ids": clean, **vars(microbatch.inputs), **vars(microbatch.targets)}
            if microbatch.inputs.attention_mask is not None:
                tensors |= vars(microbatch.inputs.attention_mask)
            arrays |= {
                f"sample_{position}/{name}": value.numpy()
                for name, value in tensors.items()
                if hasattr(value, "numpy")
            }
        return arrays
