"""The whole configuration of a run, and where it comes from."""

from __future__ import annotations

import importlib.util
import json
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_dlm.checkpointing.layout import CheckpointConfig
from megatron_dlm.data.loading.data_config import DataConfig
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.interfaces import InputError
from megatron_dlm.kernels.choice import Kernels
from megatron_dlm.models.config import ModelConfig, Precision, Recompute
from megatron_dlm.models.precision.fp8 import Fp8Config
from megatron_dlm.platform.codec import CHOICES, decode
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.lr_schedule import LrScheduleConfig
from megatron_dlm.run.optimizer_config import OptimizerConfig
from megatron_dlm.sampling.settings import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch size, precision and safety of training."""

    num_steps: int
    """Optimizer steps of the run."""
    global_batch_size: int
    """Samples per optimizer step, over all processes."""
    micro_batch_size: int = 1
    """Samples per forward and backward pass of one process."""
    ramp_start: int = 0
    """Batch size ramp-up: samples per step at the start; 0: no ramp-up."""
    ramp_increment: int = 0
    """Batch size ramp-up: samples by which the batch grows at a time; must divide global_batch_size -
    ramp_start."""
    ramp_samples: int = 0
    """Batch size ramp-up: samples until global_batch_size is reached; each size lasts equally many
    samples."""
    seed: int = 1
    """Random seed of weights, data order and noise."""
    precision: Precision = "fp32"
    """Training precision. bf16 keeps main parameters, gradients and the residual stream in fp32; fp8 is bf16
    with the layers' matrix products in FP8 (see --fp8), by Transformer Engine or emulated."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of linear layers and attention. auto: Transformer Engine on CUDA if it is installed,
    otherwise local; local: megatron-core and PyTorch, with emulated FP8."""
    masked_attention: Literal["auto", "dense", "flex"] = "auto"
    """How attention masks other than causal ones are applied (block diffusion, Eso-LM's sequential part,
    documents where Transformer Engine does not take them). dense: a boolean matrix; flex: PyTorch's
    FlexAttention, CUDA only, which skips blocks without visible pairs and compiles in the first step; auto:
    flex on CUDA with Triton kernels and without parallel.cuda_graphs, otherwise dense."""
    recompute: Recompute = "selective"
    """Activation recomputation in the backward pass; results are equal bit for bit in all cases. none: no
    recomputation; norms: outputs of norms; selective: norms and GELU, everything that needs no matrix
    product; full: whole layers, for about a third more time."""
    on_non_finite: Literal["skip", "stop", "rollback"] = "skip"
    """What to do if a loss or gradient norm is not finite; parameters never change in such a step. skip: go
    on with the next step; stop: end the run; rollback: load the newest checkpoint and go on with the samples
    after those of the step."""
    spike_sigmas: float = 0.0
    """Also treat a loss or gradient norm as not finite if it is more than this many standard deviations above
    the mean of the last 128 steps, for example 6; 0: never."""
    max_skipped_steps: int = 3
    """Abort after this many consecutive skipped steps, or rollbacks to the same checkpoint; a file to replay
    the step is written."""
    step_timeout_seconds: float = 7200.0
    """Seconds that a step may take, with the evaluation and saving after it; then each process prints the
    stacks of its threads and ends."""
    check_replicas_every: int = 1000
    """Steps between bitwise comparisons of all weights over data parallel ranks, to find memory faults; 0:
    never. Nothing is compared with parallel.fully_sharded."""
    head_rows_per_chunk: int | None = None
    """Rows (token positions) whose logits exist at a time. None: as many as take 2 MiB in float32 on a CPU,
    256 MiB on a GPU, and 128 at least."""
    kernels: Kernels = "auto"
    """Implementation of losses, norms, gates, GELU and rotary embeddings. auto: Triton on CUDA, PyTorch on a
    CPU; torch; triton: on a CPU in Triton's interpreter (TRITON_INTERPRET=1), slow, for tests."""

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "global_batch_size",
            "micro_batch_size",
            "head_rows_per_chunk",
            "max_skipped_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"training.{name}: {value} is below 1")
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
        """Global batch size of the step that begins after `consumed_samples` samples.

        Args:
            consumed_samples: samples of all earlier steps.

        Returns:
            Samples of the step; each size below global_batch_size lasts for an equal share of ramp_samples.
        """
        sizes = self.batch_sizes()
        if consumed_samples >= self.ramp_samples:
            return sizes[-1]
        return sizes[consumed_samples * (len(sizes) - 1) // self.ramp_samples]

    def samples_ahead(self, consumed_samples: int, steps: int) -> int:
        """Number of samples in the next `steps` optimizer steps.

        Args:
            consumed_samples: samples of all earlier steps.
            steps: number of steps.

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
    """Validation during training, always on the same samples and noise."""

    every: int = 1000
    """Steps between evaluations; the model is also evaluated before the first step and after the last."""
    at_flops: tuple[float, ...] = ()
    """Also evaluate after the first step at which the run has made this many FLOPs of matrix products, for
    points of one run at several budgets."""
    num_batches: int = 16
    """Batches per evaluation; a shorter validation shard is read again, with other noise."""
    batch_size: int = 64
    """Samples per evaluation batch; their diffusion times are stratified over the batch."""
    seed: int = 0
    """Random seed of validation samples, times and noise. It is separate from training.seed, so that runs
    with different seeds are compared at equal noise."""

    def __post_init__(self) -> None:
        for name in ("every", "num_batches", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"evaluation.{name}: {getattr(self, name)} is below 1")
        if not all(flops > 0 for flops in self.at_flops):
            raise InputError(f"evaluation.at_flops: {min(self.at_flops)} is not above 0")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Texts that the model writes during training: samples, a judge's perplexity on them, answers.

    Each process loads the checkpoint just saved as a whole model beside the one in training, and takes its
    share of the texts. Training itself stays as it is, bit for bit.
    """

    every: int = 0
    """Steps between, a multiple of checkpoint.save_every; 0: no texts."""
    num_samples: int = 4
    """Number of texts to sample."""
    length: int | None = None
    """Length of each text in tokens; None: the training sequence length."""
    sampling: SamplingConfig = SamplingConfig()
    """How texts are sampled."""
    batch_size: int = 8
    """Texts sampled together by one process."""
    seed: int = 0
    """Random seed; the same at each step, so that texts of different steps can be compared."""
    judge: Path | None = None
    """Model whose perplexity on the texts is logged: a local Hugging Face folder of a causal language model,
    or an AR model of this package. None: none is logged."""
    gsm8k: Path | None = None
    """JSON lines with question and answer, such as GSM8K's test.jsonl, whose exact match is logged. None:
    none is logged."""
    gsm8k_problems: int = 32
    """Problems to answer, from the start of the file."""
    records: int = 0
    """Records of prompts and responses, or chats, to answer, from the start of the validation data, left to
    right and at temperature 0. Logged is how often an answer is the record's last response, token by token.
    0: none."""

    def __post_init__(self) -> None:
        for name, least in (
            ("every", 0),
            ("num_samples", 1),
            ("batch_size", 1),
            ("gsm8k_problems", 1),
            ("records", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(f"generation.{name}: {getattr(self, name)} is below {least}")
        if not self.every and (self.judge is not None or self.gsm8k is not None or self.records):
            raise InputError(
                "generation.every: 0, and a judge, problems or records need texts every few steps"
            )


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """Metrics of a run."""

    log_every: int = 10
    """Steps per line of metrics.jsonl, TensorBoard point and printed line. Losses and speed are means over
    these steps."""
    console: Literal["auto", "live", "plain", "quiet"] = "auto"
    """What rank 0 prints. live: training steps as one line of the terminal that changes, all else above it;
    plain: a line every log_every steps; quiet: only warnings and errors; auto: live on a terminal, plain
    elsewhere and under launchers that give their processes a terminal of their own (mpirun)."""
    profile_steps: str = ""
    """Steps to profile on rank 0, FIRST:LAST, both included and counted from 1, for example 10:13. A trace
    and a table of the costliest operations go to profiles/ in the run's directory. Empty: none."""
    memory_snapshot: bool = False
    """On GPUs, record what is allocated where, and write it to profiles/ in the run's directory if memory is
    full; https://pytorch.org/memory_viz draws it."""
    energy: bool = False
    """On GPUs, log energy a token and power a device, as NVML counts them (needs nvidia-ml-py)."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also write metrics for Weights & Biases (extra wandb): offline, to wandb/ in the run's directory, from
    where `wandb sync` sends them; or online, to the server that WANDB_* variables name."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise InputError(f"telemetry.log_every: {self.log_every} is below 1")
        self.profiled_steps()

    def profiled_steps(self) -> tuple[int, int] | None:
        """The window of `profile_steps`.

        Returns:
            First and last step; None: nothing is profiled.

        Raises:
            InputError: `profile_steps` is no such window.
        """
        if not self.profile_steps:
            return None
        first, colon, last = self.profile_steps.partition(":")
        if not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise InputError(
                f"telemetry.profile_steps: {self.profile_steps!r} is not FIRST:LAST with 1 <= FIRST <= LAST"
            )
        return int(first), int(last)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole configuration of a run; saved with each checkpoint."""

    directory: Path
    """Directory of the run, with checkpoints/, tensorboard/ and metrics.jsonl; a run resumes from the newest
    checkpoint in it."""
    model: ModelConfig
    objective: ObjectiveConfig = field(metadata={CHOICES: OBJECTIVES})
    data: DataConfig
    training: TrainingConfig
    schedule: LrScheduleConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    fp8: Fp8Config = Fp8Config()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    generation: GenerationConfig = GenerationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()


def load_recipe(path: Path) -> RunConfig:
    """The configuration of a recipe or of an earlier run.

    Args:
        path: a Python file with a function `recipe() -> RunConfig`, or the run.json of a checkpoint.

    Returns:
        The configuration, before overrides.

    Raises:
        InputError: missing file, other suffix, no such function, a function that fails, or a record with
            wrong fields.
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
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "recipe", None)):
            raise InputError(f"recipe: {path}: has no function recipe() -> RunConfig")
        config = module.recipe()
    except InputError:
        raise
    except Exception as error:
        where = f"{path}{_line_of(error, spec.origin)}"
        raise InputError(f"recipe: {where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, RunConfig):
        raise InputError(f"recipe: {path}: recipe() returned {type(config).__name__}, not a RunConfig")
    return config


def _line_of(error: Exception, file: str | None) -> str:
    """Where in a file an error came up, as a part of a message; empty if it is not known."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def _load_record(path: Path) -> RunConfig:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"recipe: {path}: not JSON: {error}") from error
    if not isinstance(record, dict) or "config" not in record:
        raise InputError(f"recipe: {path}: no member 'config'; not the run.json of a checkpoint")
    return decode(RunConfig, record["config"], f"{path}: config")
