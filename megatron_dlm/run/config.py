"""The whole configuration of a run, and where it comes from."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_dlm.checkpointing.layout import CheckpointConfig
from megatron_dlm.data.loading.data_config import DataConfig
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.kernels.choice import Kernels
from megatron_dlm.models.config import ModelConfig, Precision, Recompute
from megatron_dlm.models.precision.fp8 import Fp8Config
from megatron_dlm.platform.codec import decode
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.lr_schedule import LrScheduleConfig
from megatron_dlm.run.optimizer_config import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length and batch of a run."""

    num_steps: int
    """Optimizer steps of the run."""
    global_batch_size: int
    """Samples of one optimizer step, over all processes."""
    micro_batch_size: int = 1
    """Samples of one forward-backward of one process."""
    ramp_start: int = 0
    """Samples of the first step where the batch grows to global_batch_size; 0: it has that size at once."""
    ramp_increment: int = 0
    """Samples by which the batch grows at a time; divides the whole growth."""
    ramp_samples: int = 0
    """Samples over which the batch grows, in equal parts for each size."""
    seed: int = 1
    """Addresses every draw: weights, data order, noise."""
    precision: Precision = "fp32"
    """bf16 keeps fp32 main parameters, gradients and residual stream; fp8 is bf16 with the layers' matrix
    products in FP8 (see fp8), by Transformer Engine or, on a CPU, emulated."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose linears and attention: auto, Transformer Engine's on CUDA where it is installed; local,
    megatron-core's and PyTorch's, which emulate FP8."""
    masked_attention: Literal["auto", "dense", "flex"] = "auto"
    """How attention takes masks beyond causal ones (block diffusion, Eso-LM's sequential part, documents
    where Transformer Engine does not take them): dense, a bool for each pair of positions; flex, torch's
    FlexAttention, on CUDA, which passes over blocks without visible pairs and is compiled in the first step;
    auto, flex on CUDA with Triton's kernels and without parallel.cuda_graphs."""
    recompute: Recompute = "selective"
    """Activations made again in the backward pass: none; norms, what norms give to products; selective, GELU
    too, all that costs no matrix product; full, whole layers, for a third more time. The same bits in all."""
    on_non_finite: Literal["skip", "stop", "rollback"] = "skip"
    """A loss or gradient norm that is not finite changes no parameter; then skip the step, stop, or load the
    newest checkpoint and go on with the samples behind the step's."""
    spike_sigmas: float = 0.0
    """Treat a loss or gradient norm as not finite where it is more than this many standard deviations above
    the mean of the last 128 steps, for example 6; 0: never."""
    max_skipped_steps: int = 3
    """Abort after this many consecutive skipped steps, or rollbacks to the same checkpoint; a file to replay
    the step is written."""
    step_timeout_seconds: float = 7200.0
    """Longest time from one step to the next, evaluation and saving included; then each process prints the
    stacks of its threads and ends."""
    check_replicas_every: int = 1000
    """Steps between comparisons of all weights' bits between data parallel ranks; 0: none. Nothing to compare
    where parallel.fully_sharded."""
    head_rows_per_chunk: int = 128
    """Most rows whose logits exist at a time: what a CPU's cache holds; GPUs want 1,024 and more."""
    kernels: Kernels = "auto"
    """What computes losses, norms, gates, GELU and rotary positions: auto, Triton on CUDA and PyTorch on a
    CPU; torch; triton, on a CPU in Triton's interpreter (TRITON_INTERPRET=1), slowly, for tests."""

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "global_batch_size",
            "micro_batch_size",
            "head_rows_per_chunk",
            "max_skipped_steps",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"training.{name}: {getattr(self, name)} is below 1")
        self._check_ramp()
        if not self.spike_sigmas >= 0:
            raise InputError(f"training.spike_sigmas: {self.spike_sigmas} is not 0 or above")
        if not self.step_timeout_seconds > 0:
            raise InputError(f"training.step_timeout_seconds: {self.step_timeout_seconds} is not above 0")
        if self.check_replicas_every < 0:
            raise InputError(f"training.check_replicas_every: {self.check_replicas_every} is below 0")

    def _check_ramp(self) -> None:
        if not self.ramp_start:
            if self.ramp_increment or self.ramp_samples:
                raise InputError("training.ramp_start: 0, while ramp_increment or ramp_samples is set")
            return
        growth = self.global_batch_size - self.ramp_start
        if self.ramp_start < 1 or growth < 1:
            raise InputError(
                f"training.ramp_start: {self.ramp_start} is outside [1, global_batch_size "
                f"{self.global_batch_size})"
            )
        if self.ramp_increment < 1 or growth % self.ramp_increment:
            raise InputError(
                f"training.ramp_increment: {self.ramp_increment} does not divide global_batch_size - "
                f"ramp_start = {growth}"
            )
        if self.ramp_samples < 1:
            raise InputError(f"training.ramp_samples: {self.ramp_samples} is below 1")

    def batch_sizes(self) -> list[int]:
        """All sizes that a step's batch takes, in order."""
        if not self.ramp_start:
            return [self.global_batch_size]
        return list(range(self.ramp_start, self.global_batch_size + 1, self.ramp_increment))

    def batch_size_at(self, consumed_samples: int) -> int:
        """Samples of the step that begins there.

        Args:
            consumed_samples: of the steps before.

        Returns:
            Of the sizes below global_batch_size each one for the same share of ramp_samples.
        """
        sizes = self.batch_sizes()
        if consumed_samples >= self.ramp_samples:
            return sizes[-1]
        return sizes[consumed_samples * (len(sizes) - 1) // self.ramp_samples]

    def samples_ahead(self, consumed_samples: int, steps: int) -> int:
        """Samples of the next steps.

        Args:
            consumed_samples: of the steps before.
            steps: how many.

        Returns:
            Sum of their batch sizes.
        """
        consumed = consumed_samples
        while consumed < self.ramp_samples and steps:
            consumed += self.batch_size_at(consumed)
            steps -= 1
        return consumed - consumed_samples + steps * self.global_batch_size


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Validation during training, always with the same blocks and noise."""

    every: int = 1000
    """Steps between evaluations; one is also made before the first step and after the last."""
    num_batches: int = 16
    """Batches of one evaluation; a shorter validation shard is read again, with other noise."""
    batch_size: int = 64
    """Samples among which the times of one evaluation batch are stratified."""
    seed: int = 0
    """Random seed of validation blocks, times and noise, apart from the run's own seed, so that runs with
    different seeds are compared at equal noise."""

    def __post_init__(self) -> None:
        for name in ("every", "num_batches", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"evaluation.{name}: {getattr(self, name)} is below 1")


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """What a run reports."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl, TensorBoard points and, without a terminal, printed lines."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise InputError(f"telemetry.log_every: {self.log_every} is below 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run; recorded in each checkpoint."""

    directory: Path
    """Holds checkpoints/, tensorboard/ and metrics.jsonl; a run continues from what it finds here."""
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    training: TrainingConfig
    schedule: LrScheduleConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    fp8: Fp8Config = Fp8Config()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()


def load_recipe(path: Path) -> RunConfig:
    """The configuration of a recipe or of an earlier run.

    Args:
        path: a Python file with a function `recipe() -> RunConfig`, or the run.json of a checkpoint.

    Returns:
        The configuration, before overrides.

    Raises:
        InputError: missing file, other suffix, no such function, or a record with wrong fields.
    """
    if not path.is_file():
        raise InputError(f"recipe: {path}: no such file")
    if path.suffix == ".json":
        return _load_record(path)
    if path.suffix != ".py":
        raise InputError(f"recipe: {path}: suffix {path.suffix!r} is neither .py nor .json")
    spec = importlib.util.spec_from_file_location("megatron_dlm_recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "recipe", None)):
        raise InputError(f"recipe: {path}: has no function recipe() -> RunConfig")
    config = module.recipe()
    if not isinstance(config, RunConfig):
        raise InputError(f"recipe: {path}: recipe() returned {type(config).__name__}, not a RunConfig")
    return config


def _load_record(path: Path) -> RunConfig:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"recipe: {path}: not JSON: {error}") from error
    if not isinstance(record, dict) or "config" not in record:
        raise InputError(f"recipe: {path}: no member 'config'; not the run.json of a checkpoint")
    return decode(RunConfig, record["config"], f"{path}: config")
