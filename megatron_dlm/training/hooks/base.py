"""What happens around steps: metrics, validation, checkpoints, requests."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from megatron_dlm.checkpointing.async_writer import SavePlans
from megatron_dlm.checkpointing.layout import CheckpointConfig, CheckpointRoot
from megatron_dlm.checkpointing.manager import PROGRESS_RECORD, RUN_RECORD, PendingSave
from megatron_dlm.interfaces import SaveError
from megatron_dlm.models.flops.flops_actual import Work
from megatron_dlm.platform.codec import encode
from megatron_dlm.platform.device_flops import matmul_flops_per_second
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.telemetry.writers import ConsoleWriter, JsonLinesWriter, TensorBoardWriter, Writer
from megatron_dlm.training.loop import Hook, Progress, StepReport
from megatron_dlm.training.session import Session
from megatron_dlm.training.signals import StopSignals

SAVE_REQUEST = "save-now"
"""Making this file in a run's directory asks for a checkpoint after the current step or the next, which
removes it."""


class Telemetry:
    """The writers of rank 0; on other ranks it takes everything and writes nothing.

    A full disk costs metrics, never a run: the first failure of a writer is told.
    """

    def __init__(self, session: Session, first_step: int) -> None:
        self._writers: list[Writer] = []
        self._failed: set[str] = set()
        if session.parallel.rank == 0:
            directory = session.config.directory
            self._writers = [
                JsonLinesWriter(directory, first_step),
                TensorBoardWriter(directory, first_step),
                ConsoleWriter(session.config.training.num_steps, first_step),
            ]

    def write(self, kind: str, step: int, metrics: dict[str, float | int]) -> None:
        """Pass on to all writers."""
        for writer in self._writers:
            with self._failure_told(writer):
                writer.write(kind, step, metrics)

    def close(self) -> None:
        """Close all writers."""
        for writer in self._writers:
            with self._failure_told(writer):
                writer.close()

    @contextmanager
    def _failure_told(self, writer: Writer) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            name = type(writer).__name__
            if name not in self._failed:
                print(f"warning: {name}: {error}; training goes on", file=sys.stderr, flush=True)
            self._failed.add(name)


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


class EvaluationHook(Hook):
    """Validation bound before the first step, every few steps and at the end."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def on_start(self, session: Session, progress: Progress) -> None:
        """Evaluate a new run's initial model."""
        if progress.step == 0 and not progress.stop_requested:
            self._evaluate(session, progress)

    def after_step(self, session: Session, progress: Progress, report: StepReport) -> None:
        """Evaluate when due."""
        last = progress.step == session.config.training.num_steps
        if last or progress.step % session.config.evaluation.every == 0:
            self._evaluate(session, progress)

    def _evaluate(self, session: Session, progress: Progress) -> None:
        result = session.validation.run(session.config.evaluation)
        metrics: dict[str, float | int] = {
            "nats_per_token": result.nats_per_token,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.tokens,
        }
        if result.standard_error is not None:
            metrics["standard_error"] = result.standard_error
        self._telemetry.write("validation", progress.step, metrics)


class CheckpointHook(Hook):
    """Saves every few steps and at the end, whether the run is done or asked to stop."""

    def __init__(self, root: CheckpointRoot, saved_step: int, parallel: ParallelState) -> None:
        self._root = root
        self._plans = SavePlans(parallel)
        self._saved_step = saved_step
        self._pending: PendingSave | None = None
        self._failures = 0

    def on_start(self, session: Session, progress: Progress) -> None:
        """Ask in each step whether a save is still being written."""
        session.votes["writing"] = lambda: self._pending is not None and not self._pending.is_done()

    def after_step(self, session: Session, progress: Progress, report: StepReport) -> None:
        """Save when due or asked to."""
        if self._pending and not session.agreed["writing"]:
            self.finish(session)
        if progress.save_requested or progress.step % session.config.checkpoint.save_every == 0:
            self._save(session, progress)

    def on_end(self, session: Session, progress: Progress) -> None:
        """Save what has not been saved; here a failure is final."""
        self.finish(session)
        if progress.step != self._saved_step:
            self._failures = session.config.checkpoint.max_failed_saves
            self._save(session, progress)
            self.finish(session)
        # One that came too late to be seen has been answered too.
        self._forget_request(session)

    def _save(self, session: Session, progress: Progress) -> None:
        self.finish(session)
        records = {
            RUN_RECORD: {
                "config": encode(session.config),
                "vocabulary": encode(session.data.vocabulary),
                "tokenizer_fingerprint": session.data.tokenizer_fingerprint,
                "train_sha256": session.data.train_sha256,
            },
            PROGRESS_RECORD: {
                "step": progress.step,
                "consumed_samples": progress.consumed_samples,
                "fingerprint": progress.fingerprint,
                "recent_losses": progress.recent_losses,
                "recent_grad_norms": progress.recent_grad_norms,
                "world_size": session.parallel.world_size,
                "data_plan": encode(session.plan),
            },
        }
        checkpoint = session.config.checkpoint
        with self._failures_counted(session, progress.step):
            self._pending = PendingSave(
                self._root,
                progress.step,
                session.denoiser,
                session.optimizer,
                session.parallel,
                self._plans,
                records,
                checkpoint.save_timeout_seconds,
            )
        if progress.save_requested:
            self._forget_request(session)
        if not checkpoint.async_save:
            self.finish(session)

    def _forget_request(self, session: Session) -> None:
        if session.parallel.rank == 0:
            with suppress(OSError):
                # What cannot be removed asks again after the next step.
                (session.config.directory / SAVE_REQUEST).unlink(missing_ok=True)

    def finish(self, session: Session) -> None:
        """Wait for a save that is under way; all ranks call it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self._failures_counted(session, pending.step):
            pending.finish()
            self._saved_step = pending.step
            self._failures = 0
            if session.parallel.rank == 0:
                self._remove_superfluous(session.config.checkpoint)

    def _remove_superfluous(self, config: CheckpointConfig) -> None:
        try:
            self._root.retain(config.keep_last, config.keep_every)
        except OSError as error:
            # The next save tries again; what it leaves is complete.
            print(f"warning: older checkpoints stay: {error}", file=sys.stderr, flush=True)

    @contextmanager
    def _failures_counted(self, session: Session, step: int) -> Iterator[None]:
        """Let training go on after a failed save, some times."""
        try:
            yield
        except SaveError as error:
            self._failures += 1
            failed = f"checkpoint of step {step} was not saved: {error}"
            if self._failures >= session.config.checkpoint.max_failed_saves:
                raise SaveError(failed) from error
            if session.parallel.rank == 0:
                print(f"warning: {failed}; training goes on", file=sys.stderr, flush=True)


class RequestHook(Hook):
    """What asks a run from outside to save or to stop: signals, the time limit, a file in its directory."""

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        self._started_at = time.monotonic()

    def on_start(self, session: Session, progress: Progress) -> None:
        """Make no step where a signal has come before the first; the time limit lets each start make one."""
        config, is_first = session.config, session.parallel.rank == 0
        limit_seconds = 60 * config.checkpoint.stop_after_minutes
        begun = torch.tensor(int(self._signals.received), device=session.parallel.device)
        dist.all_reduce(begun, op=dist.ReduceOp.MAX)
        progress.stop_requested = bool(begun)

        def must_stop() -> bool:
            late = bool(limit_seconds) and time.monotonic() - self._started_at > limit_seconds
            return self._signals.received or late

        # Among all ranks, so that none waits for one that has left.
        session.votes["stop"] = must_stop
        session.votes["save"] = lambda: is_first and os.path.exists(config.directory / SAVE_REQUEST)

    def after_step(self, session: Session, progress: Progress, report: StepReport) -> None:
        """Stop or save after this step, or where asked late in it, after the next."""
        progress.stop_requested = session.agreed["stop"]
        progress.save_requested = session.agreed["save"]
