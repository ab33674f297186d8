"""The loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dlm.models.flops.flops_actual import Work
from megatron_dlm.platform.gpu import STATE_CURES, allocating
from megatron_dlm.training.optimizer import set_learning_rate, step_if_finite
from megatron_dlm.training.session import Session
from megatron_dlm.training.spike_detection import extended, spike_limit


@dataclass
class Progress:
    """How far a run has come; all that a resume needs besides the tensors."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    fingerprint: int = 0
    """Digest of the last step's corruption."""
    recent_losses: tuple[float, ...] = ()
    """Of the last steps, where spikes are looked for."""
    recent_grad_norms: tuple[float, ...] = ()
    stop_requested: bool = False
    """Set by a hook; the loop ends after the current step."""
    save_requested: bool = False
    """Set by a hook; a checkpoint is saved after the current step."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

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
    bad_samples: tuple[int, ...]
    """Samples at fault where loss or gradient is not finite or a spike, and no parameter has changed."""
    fault: str
    """What it is, where there are such samples."""

    @property
    def applied(self) -> bool:
        """The optimizer has made a step."""
        return not self.bad_samples


class Hook:
    """Something done at the edges of steps; a subclass overrides what it needs."""

    def on_start(self, session: Session, progress: Progress) -> None:
        """Before the first step of this process."""

    def after_step(self, session: Session, progress: Progress, report: StepReport) -> None:
        """After each optimizer step, on all ranks."""

    def on_end(self, session: Session, progress: Progress) -> None:
        """After the last step, on all ranks."""


def fit(session: Session, progress: Progress, hooks: Sequence[Hook]) -> None:
    """Train from `progress` to the configured number of steps, or until a hook asks to stop.

    Args:
        session: model, optimizer and data.
        progress: where to begin; kept up to date.
        hooks: called in this order.
    """
    for hook in hooks:
        hook.on_start(session, progress)
    while progress.step < session.config.training.num_steps and not progress.stop_requested:
        report = train_step(session, progress)
        for hook in hooks:
            hook.after_step(session, progress, report)
    for hook in hooks:
        hook.on_end(session, progress)


def train_step(session: Session, progress: Progress) -> StepReport:
    """One optimizer step; moves `progress` on."""
    started = time.monotonic()
    size = session.config.training.batch_size_at(progress.consumed_samples)
    sums = session.run_batch(progress.step, progress.consumed_samples)
    lr = session.config.schedule.at(progress.step)
    set_learning_rate(session.optimizer, lr)
    sigmas, loss = session.config.training.spike_sigmas, sums.loss / sums.tokens
    grad_norm, fault, bad_samples = math.nan, "loss: not finite", sums.bad_samples
    whole_batch = tuple(range(progress.consumed_samples, progress.consumed_samples + size))
    if not bad_samples and loss > (limit := spike_limit(progress.recent_losses, sigmas)):
        fault, bad_samples = f"loss: {loss:.4g} is above {limit:.4g}", whole_batch
    if not bad_samples:
        limit = spike_limit(progress.recent_grad_norms, sigmas)
        with allocating("the optimizer's moments", STATE_CURES):
            grad_norm = step_if_finite(session.optimizer, limit)
        if not math.isfinite(grad_norm):
            fault, bad_samples = "gradient norm: not finite", whole_batch
        elif grad_norm > limit:
            fault, bad_samples = f"gradient norm: {grad_norm:.4g} is above {limit:.4g}", whole_batch
    if sigmas and not bad_samples:
        progress.recent_losses = extended(progress.recent_losses, loss)
        progress.recent_grad_norms = extended(progress.recent_grad_norms, grad_norm)
    progress.step += 1
    progress.consumed_samples += size
    progress.fingerprint = sums.fingerprint
    return StepReport(
        loss=loss,
        nats_per_token=sums.bound / sums.tokens,
        lr=lr,
        grad_norm=grad_norm,
        batch_size=size,
        tokens=sums.tokens,
        work=sums.work,
        seconds=time.monotonic() - started,
        bad_samples=bad_samples,
        fault=fault,
    )
