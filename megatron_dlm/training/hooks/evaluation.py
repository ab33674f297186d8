"""Validation during training."""

from __future__ import annotations

from megatron_dlm.telemetry.writers import Metrics
from megatron_dlm.training.hooks.telemetry import Telemetry
from megatron_dlm.training.loop import Hook
from megatron_dlm.training.progress import StepReport, TrainingProgress
from megatron_dlm.training.session import Session


class EvaluationHook(Hook):
    """Validation bound before the first step, every few steps, at numbers of FLOPs, and at the end."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._flops_before = 0

    def on_start(self, session: Session, progress: TrainingProgress) -> None:
        """Evaluate a new run's initial model."""
        self._flops_before = progress.training_flops
        if progress.step == 0 and not progress.stop_requested:
            self._evaluate(session, progress)

    def after_step(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Evaluate when due."""
        config, before = session.config.evaluation, self._flops_before
        self._flops_before = progress.training_flops
        last = progress.step == session.config.training.num_steps
        reached = any(before < flops <= progress.training_flops for flops in config.at_flops)
        if last or reached or progress.step % config.every == 0:
            self._evaluate(session, progress)

    def after_rollback(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Count from the checkpoint."""
        self._flops_before = progress.training_flops

    def _evaluate(self, session: Session, progress: TrainingProgress) -> None:
        result = session.validation.run(session.config.evaluation)
        metrics: Metrics = {
            "nats_per_token": result.nats_per_token,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.tokens,
            "training_flops": progress.training_flops,
        }
        if result.standard_error is not None:
            metrics["standard_error"] = result.standard_error
        self._telemetry.write("validation", progress.step, metrics)
