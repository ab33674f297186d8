"""The training loop: steps, and hooks around them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from megatron_dlm.platform.distributed_optimizer import average_weights
from megatron_dlm.platform.gpu import STATE_CURES, allocating
from megatron_dlm.training.optimizer import set_learning_rate, step_if_finite
from megatron_dlm.training.progress import StepReport, TrainingProgress
from megatron_dlm.training.session import Session
from megatron_dlm.training.spike_detection import extended, spike_limit


class Hook:
    """Something done at the edges of steps; a subclass overrides what it needs."""

    def on_start(self, session: Session, progress: TrainingProgress) -> None:
        """Before the first step of this process."""

    def after_step(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """After each optimizer step, on all ranks, but not after one that was rolled back."""

    def after_rollback(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Called on all ranks after a step that rolled the run back to a checkpoint.

        Args:
            session: holds the weights and optimizer state of the checkpoint.
            progress: progress of the checkpoint.
            report: report of the step that caused the rollback.
        """

    def on_end(self, session: Session, progress: TrainingProgress) -> None:
        """After the last step, on all ranks."""


def fit(session: Session, progress: TrainingProgress, hooks: Sequence[Hook]) -> None:
    """Train from `progress` to the configured number of steps, or until a hook asks to stop.

    Args:
        session: model, optimizer and data.
        progress: step and samples to start from; updated after each step.
        hooks: called in this order.
    """
    for hook in hooks:
        hook.on_start(session, progress)
    while progress.step < session.config.training.num_steps and not progress.stop_requested:
        report = train_step(session, progress)
        for hook in hooks:
            # The first hook may have gone back to an earlier step.
            is_rolled_back = progress.step != report.step
            (hook.after_rollback if is_rolled_back else hook.after_step)(session, progress, report)
    for hook in hooks:
        hook.on_end(session, progress)


def train_step(session: Session, progress: TrainingProgress) -> StepReport:
    """Make one optimizer step and move `progress` on."""
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
            grad_norm = step_if_finite(session.optimizer, session.parallel.device, limit)
        if not math.isfinite(grad_norm):
            fault, bad_samples = "gradient norm: not finite", whole_batch
        elif grad_norm > limit:
            fault, bad_samples = f"gradient norm: {grad_norm:.4g} is above {limit:.4g}", whole_batch
    if not bad_samples and (decay := session.config.optimizer.ema_decay):
        average_weights(session.optimizer, decay, progress.step + 1)
    if sigmas and not bad_samples:
        progress.recent_losses = extended(progress.recent_losses, loss)
        progress.recent_grad_norms = extended(progress.recent_grad_norms, grad_norm)
    progress.training_flops += sums.work.training_flops(session.config.model, session.data.vocabulary.size)
    progress.step += 1
    progress.consumed_samples += size
    progress.fingerprint = sums.fingerprint
    return StepReport(
        step=progress.step,
        fingerprint=sums.fingerprint,
        loss=loss,
        nats_per_token=sums.bound / sums.tokens,
        lr=lr,
        grad_norm=grad_norm,
        batch_size=size,
        tokens=sums.tokens,
        work=sums.work,
        seconds=time.monotonic() - started,
        band_nats=sums.band_nats,
        bad_samples=bad_samples,
        fault=fault if bad_samples else "",
    )
