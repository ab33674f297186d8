"""Metrics of training steps."""

from __future__ import annotations

from megatron_dlm.models.flops.flops_actual import Work
from megatron_dlm.platform.device_flops import matmul_flops_per_second
from megatron_dlm.training.hooks.telemetry import Telemetry
from megatron_dlm.training.loop import Hook, Progress, StepReport
from megatron_dlm.training.session import Session


class LoggingHook(Hook):
    """Reports every few steps: losses and speed are means over the tokens since the last report.

    Utilisation is the model's matrix products, recomputation and padding left out, over the speed of this
    device's own matrix product, measured at the start.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._reports: list[StepReport] = []
        self._peak = 0.0

    def on_start(self, session: Session, progress: Progress) -> None:
        """Measure the device, on all ranks at once."""
        dtype = session.denoiser.config.params_dtype
        self._peak = matmul_flops_per_second(session.parallel.device, dtype)

    def after_step(self, session: Session, progress: Progress, report: StepReport) -> None:
        """Write the means, and this step's learning rate, gradient norm and noise fingerprint."""
        if not report.applied:
            skipped: dict[str, float | int] = {
                "samples_at_fault": len(report.bad_samples),
                "fingerprint": progress.fingerprint,
            }
            self._telemetry.write("skipped", progress.step, skipped)
            return
        self._reports.append(report)
        if progress.step % session.config.telemetry.log_every:
            return
        tokens = sum(r.tokens for r in self._reports)
        seconds = sum(r.seconds for r in self._reports)
        speed = tokens / seconds
        work = sum((r.work for r in self._reports), Work())
        flops = work.training_flops(session.config.model, session.data.vocabulary.size)
        device_flops_per_second = flops / seconds / session.parallel.world_size
        training = session.config.training
        samples_left = training.samples_ahead(progress.consumed_samples, training.num_steps - progress.step)
        metrics: dict[str, float | int] = {
            "loss": sum(r.loss * r.tokens for r in self._reports) / tokens,
            "nats_per_token": sum(r.nats_per_token * r.tokens for r in self._reports) / tokens,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "tokens_per_second": speed,
            "tflops_per_second_per_device": device_flops_per_second / 1e12,
            "mfu": device_flops_per_second / self._peak,
            "eta_seconds": samples_left * seconds / sum(r.batch_size for r in self._reports),
            "batch_size": report.batch_size,
            "consumed_samples": progress.consumed_samples,
            "fingerprint": progress.fingerprint,
        }
        epochs = session.epochs(progress.consumed_samples)
        metrics |= {f"epochs/{name}": value for name, value in epochs.items()}
        self._telemetry.write("train", progress.step, metrics)
        self._reports = []

    def on_end(self, session: Session, progress: Progress) -> None:
        """Close the writers; what else writes metrics comes before this hook."""
        self._telemetry.close()
