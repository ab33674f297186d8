"""Metrics of training steps."""

from __future__ import annotations

import time

import numpy as np
from megatron.core.energy_monitor import EnergyMonitor

from megatron_dlm.families.schedules import scheduled_values
from megatron_dlm.platform.device_flops import matmul_flops_per_second
from megatron_dlm.platform.gpu import waiting_for_gpu
from megatron_dlm.platform.megatron import energy_monitor
from megatron_dlm.telemetry.writers import FIRST_STEP, Metrics
from megatron_dlm.training.hooks.telemetry import Telemetry
from megatron_dlm.training.loop import Hook
from megatron_dlm.training.progress import MetricsWindow, StepReport, TrainingProgress
from megatron_dlm.training.session import Session


class LoggingHook(Hook):
    """Writes a line of metrics every few steps; losses and speed are means over tokens since the last line.

    A rank's own time ends where gradients are exchanged, so the slowest rank, which the others wait for, has
    the longest. Lines are written at multiples of `telemetry.log_every`, and one more at the last step of the
    run.
    MFU is the FLOP/s of the model's matrix products, without recomputation and padding, divided by the FLOP/s
    of a matrix product measured on this device at the start.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._peak = 0.0
        self._energy: EnergyMonitor | None = None
        self._first_measured_step, self._lap_began_at = 0, 0.0

    def on_start(self, session: Session, progress: TrainingProgress) -> None:
        """Measure the device, on all ranks at once."""
        dtype = session.denoiser.config.params_dtype
        self._peak = matmul_flops_per_second(session.parallel.device, dtype)
        if session.config.telemetry.energy:
            self._energy = energy_monitor(session.parallel.device)
            self._energy.resume()
            self._first_measured_step, self._lap_began_at = progress.step + 1, time.monotonic()

    def after_step(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Add the step to the window; write the window's means where it ends."""
        if not report.applied:
            self._telemetry.write("skipped", report.step, _fault(report))
        progress.window = progress.window.extended(report)
        ends = progress.step % session.config.telemetry.log_every == 0
        if ends or progress.step == session.config.training.num_steps:
            if progress.window.tokens:
                ranks = _of_all_ranks(session) | self._energy_metrics(session, progress.window)
                self._telemetry.write("train", progress.step, self._means(session, progress) | ranks)
        if ends:
            # A run that is given more steps later goes on with the short window of its last step.
            progress.window = MetricsWindow()

    def after_rollback(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Discard metrics of steps that will be repeated, and log the step that caused the rollback."""
        self._telemetry.rewind(progress.step)
        self._telemetry.write("rollback", progress.step, {"failed_step": report.step} | _fault(report))

    def _means(self, session: Session, progress: TrainingProgress) -> Metrics:
        window, training = progress.window, session.config.training
        steps = window.step_seconds or (0.0,)
        flops = window.work.training_flops(session.config.model, session.data.vocabulary.size)
        device_flops_per_second = flops / window.seconds / session.parallel.world_size
        samples_left = training.samples_ahead(progress.consumed_samples, training.num_steps - progress.step)
        epochs = session.epochs(progress.consumed_samples)
        return {
            FIRST_STEP: window.first_step,
            "loss": window.loss / window.tokens,
            "nats_per_token": window.nats / window.tokens,
            "lr": window.lr,
            "grad_norm": window.grad_norm,
            "tokens_per_second": window.tokens / window.seconds,
            "tokens_per_second_per_device": window.tokens / window.seconds / session.parallel.world_size,
            "step_seconds_median": float(np.median(steps)),
            "step_seconds_p95": float(np.quantile(steps, 0.95)),
            "tflops_per_second_per_device": device_flops_per_second / 1e12,
            "mfu": device_flops_per_second / self._peak,
            "eta_seconds": samples_left * window.seconds / window.samples,
            "batch_size": window.batch_size,
            "consumed_samples": progress.consumed_samples,
            "training_flops": progress.training_flops,
            "fingerprint": progress.fingerprint,
            "time": time.time(),
            **_by_time(window),
            **{
                f"schedule/{name}": value
                for name, value in scheduled_values(session.config.objective, progress.step - 1).items()
            },
            **{f"epochs/{name}": value for name, value in epochs.items()},
        }

    def _energy_metrics(self, session: Session, window: MetricsWindow) -> Metrics:
        """Energy of all devices since the last line, evaluations and saves included.

        Nothing for a line that a run before this one began.
        """
        if self._energy is None:
            return {}
        with waiting_for_gpu("the energy of all ranks"):
            joules = self._energy.lap()
        seconds, self._lap_began_at = time.monotonic() - self._lap_began_at, time.monotonic()
        if window.first_step < self._first_measured_step:
            return {}
        watts = joules / seconds / session.parallel.world_size
        return {"joules_per_token": joules / window.tokens, "watts_per_device": watts}

    def on_end(self, session: Session, progress: TrainingProgress) -> None:
        """Close the writers; what else writes metrics comes before this hook."""
        self._telemetry.close()


def _of_all_ranks(session: Session) -> Metrics:
    """Means over steps of what ranks do by themselves, the slowest named; nothing before the second step."""
    reports, session.rank_reports = session.rank_reports, []
    if not reports:
        return {}
    passes, waits, memory = np.array(reports, dtype=np.float64).mean(axis=0).T
    return {
        "data_wait_seconds": float(waits.max()) / 1e6,
        "memory_gib": float(memory.max()) / 2**30,
        "rank_seconds_median": float(np.median(passes)) / 1e6,
        "rank_seconds_max": float(passes.max()) / 1e6,
        "slowest_rank": int(passes.argmax()),
    }


def _by_time(window: MetricsWindow) -> Metrics:
    """NELBO per token by band of the diffusion time; bands without a sample are left out."""
    count = len(window.band_nats)
    return {
        f"nats_per_token/t{band / count:.2f}-{(band + 1) / count:.2f}": nats / tokens
        for band, (nats, tokens) in enumerate(zip(window.band_nats, window.band_tokens, strict=True))
        if tokens
    }


def _fault(report: StepReport) -> Metrics:
    return {
        "fault": report.fault,
        "samples_at_fault": len(report.bad_samples),
        "fingerprint": report.fingerprint,
    }
