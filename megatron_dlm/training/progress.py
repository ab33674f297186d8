"""What one optimizer step did, what is summed up for the next line of metrics, and how far a run has come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from megatron_dlm.models.flops.flops_actual import Work
from megatron_dlm.platform.codec import decode, encode


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    """Number of the step, counted from 1."""
    fingerprint: int
    """Digest of the step's corruption."""
    loss: float
    """Training loss per token; for low-variance weights not an NLL."""
    nats_per_token: float
    """The NELBO (AR: NLL) on the step's own batch and noise."""
    lr: float
    grad_norm: float
    batch_size: int
    """Samples, over all processes."""
    tokens: int
    work: Work
    seconds: float
    band_nats: tuple[float, ...]
    """Sum of the NELBO of the samples in each band of the diffusion time, in nats; empty without bands."""
    bad_samples: tuple[int, ...]
    """Positions in the run of samples with a non-finite or spiking loss or gradient; if there are any, the
    step changed no parameter."""
    fault: str
    """Description of the fault if `bad_samples` is not empty; otherwise empty."""

    @property
    def applied(self) -> bool:
        """The optimizer has made a step."""
        return not self.bad_samples


@dataclass(frozen=True)
class MetricsWindow:
    """Sums over the steps since the last line of metrics; saved with a checkpoint.

    A resumed run goes on with the sums of the run before, so that its lines are those of a run that was
    never interrupted.
    """

    first_step: int = 0
    """Number of the first step after the last line."""
    loss: float = 0.0
    """Sum of the weighted training loss over tokens, in nats."""
    nats: float = 0.0
    """Sum of the NELBO (AR: NLL) over tokens, in nats."""
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
    """Time spent in steps, without the time between two runs."""
    step_seconds: tuple[float, ...] = ()
    """Time of each step."""
    work: Work = field(default_factory=Work)
    lr: float = 0.0
    """Learning rate of the last applied step."""
    grad_norm: float = 0.0
    """Gradient norm of the last applied step."""
    batch_size: int = 0
    """Samples of the last applied step."""
    band_nats: tuple[float, ...] = ()
    """Sum of the NELBO over the samples in each band of the diffusion time, in nats."""
    band_tokens: tuple[float, ...] = ()
    """Tokens of these samples, each counted as the mean of its step."""

    def extended(self, report: StepReport) -> MetricsWindow:
        """The window with one more step in it; a skipped step only opens an empty window."""
        first_step = self.first_step or report.step
        if not report.applied:
            return dataclasses.replace(self, first_step=first_step)
        return MetricsWindow(
            first_step=first_step,
            loss=self.loss + report.loss * report.tokens,
            nats=self.nats + report.nats_per_token * report.tokens,
            tokens=self.tokens + report.tokens,
            samples=self.samples + report.batch_size,
            seconds=self.seconds + report.seconds,
            step_seconds=(*self.step_seconds, report.seconds),
            work=self.work + report.work,
            lr=report.lr,
            grad_norm=report.grad_norm,
            batch_size=report.batch_size,
            band_nats=_added(self.band_nats, report.band_nats),
            band_tokens=_added(self.band_tokens, _band_tokens(report)),
        )


def _added(sums: tuple[float, ...], more: tuple[float, ...]) -> tuple[float, ...]:
    """Sums with those of one more step; a run that has changed its family, or its version, begins anew."""
    before = sums if len(sums) == len(more) else (0.0,) * len(more)
    return tuple(a + b for a, b in zip(before, more, strict=True))


def _band_tokens(report: StepReport) -> tuple[float, ...]:
    """Strata of the batch that lie in each band, times the mean tokens of a sample."""
    count, size = len(report.band_nats), report.batch_size
    edges = [-(-band * size // count) for band in range(count + 1)] if count else [0]
    return tuple((b - a) * report.tokens / size for a, b in pairwise(edges))


@dataclass
class TrainingProgress:
    """How far a run has come: all that a resume needs besides tensors and the data plan."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    training_flops: int = 0
    """Matrix-product FLOPs of all steps, recomputation and padding not counted; a run that goes on from a
    version without this number counts from there."""
    fingerprint: int = 0
    """Digest of the last step's corruption."""
    recent_losses: tuple[float, ...] = ()
    """Losses of the last steps, in nats per token; recorded only if spike detection is on."""
    recent_grad_norms: tuple[float, ...] = ()
    """Gradient norms of the last steps; recorded only if spike detection is on."""
    window: MetricsWindow = field(default_factory=MetricsWindow)
    """Sums over the steps since the last line of metrics."""
    stop_requested: bool = False
    """Set by a hook; the loop ends after the current step. Not saved."""
    save_requested: bool = False
    """Set by a hook; a checkpoint is saved after the current step. Not saved."""

    def record(self) -> dict[str, Any]:
        """The saved fields as JSON values."""
        return {name: encode(getattr(self, name)) for name in _SAVED}

    @classmethod
    def of_record(cls, record: Mapping[str, Any], where: str) -> TrainingProgress:
        """Restore the progress from the JSON values of `record`.

        Args:
            record: output of `record`, of this or an earlier version; unknown entries are ignored.
            where: name of the record in error messages.

        Returns:
            Progress from which training continues.

        Raises:
            InputError: a field is missing or of the wrong type.
        """
        return decode(cls, {name: record[name] for name in _SAVED if name in record}, where)

    def go_back_to(self, saved: TrainingProgress) -> None:
        """Return to an earlier checkpoint, but keep `consumed_samples`, so that no sample is read again.

        Args:
            saved: progress of the checkpoint.
        """
        for name in _SAVED:
            if name != "consumed_samples":
                setattr(self, name, getattr(saved, name))


_SAVED = tuple(
    entry.name
    for entry in dataclasses.fields(TrainingProgress)
    if entry.name not in ("stop_requested", "save_requested")
)
