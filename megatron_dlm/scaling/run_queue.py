"""Runs that are missing from a grid, one after another or a few at a time, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_dlm.checkpointing.layout import CHECKPOINTS, CheckpointRoot, step_of
from megatron_dlm.platform.exit_codes import EXIT_PREEMPTED
from megatron_dlm.run.run_file import configured_steps
from megatron_dlm.scaling.run_list import PlannedRun
from megatron_dlm.telemetry.writers import read_metrics

POLL_SECONDS, TICK_SECONDS = 0.1, 2.0


class Job(Protocol):
    """A run that has been started."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def terminate(self) -> None:
        """Ask it to save and end."""


@dataclass
class Started:
    """A run at work."""

    run: PlannedRun
    job: Job
    began_at: float


@dataclass
class QueueState:
    """How far a queue has come."""

    total: int
    finished: list[PlannedRun] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    """Exit codes by name."""
    stopped: list[str] = field(default_factory=list)
    """Runs that a signal has ended."""
    running: list[Started] = field(default_factory=list)

    def flops_left(self, waiting: Sequence[PlannedRun]) -> float:
        """FLOPs of what is still to be trained."""
        return sum(run.own_flops for run in waiting) + sum(
            started.run.own_flops * (1 - progress_of(started.run)) for started in self.running
        )


def progress_of(run: PlannedRun) -> float:
    """Share of a run's steps that are done."""
    last_step = configured_steps(run.directory)
    steps = [entry["step"] for entry in read_metrics(run.directory) if entry["kind"] == "train"]
    if not last_step or not steps:
        return 0.0
    first_step = last_step * run.shared_flops / run.actual_flops
    return min(1.0, max(0.0, (steps[-1] - first_step) / (last_step - first_step)))


def is_finished(directory: Path) -> bool:
    """Whether a run's directory holds the checkpoint of its last step."""
    num_steps = configured_steps(directory)
    complete = CheckpointRoot(directory / CHECKPOINTS).complete()
    return num_steps is not None and bool(complete) and step_of(complete[-1]) >= num_steps


class RunQueue:
    """Starts runs and waits for them."""

    def __init__(
        self,
        waiting: Sequence[PlannedRun],
        start: Callable[[PlannedRun], Job],
        jobs: int,
        ended: Callable[[Started, int, QueueState, float], None],
    ) -> None:
        """Prepare; nothing is started.

        Args:
            waiting: runs to start, in this order.
            start: starts one.
            jobs: runs at a time.
            ended: called after each run with its exit code, the state and the FLOPs that are left.
        """
        self._waiting = list(waiting)
        self._start, self._jobs, self._ended = start, jobs, ended
        self._stopping = False
        self.state = QueueState(len(waiting))

    def stop(self) -> None:
        """Ask all runs to save and end; none is started any more. For signal handlers."""
        self._stopping = True

    def work(self, tick: Callable[[QueueState, float], None]) -> QueueState:
        """Run all, or until `stop`.

        Args:
            tick: called every two seconds with the state and the FLOPs that are left.

        Returns:
            The state at the end.
        """
        told_to_stop, next_tick = False, time.monotonic()
        while self.state.running or (self._next() and not self._stopping):
            while len(self.state.running) < self._jobs and not self._stopping and (run := self._next()):
                self._waiting.remove(run)
                self.state.running.append(Started(run, self._start(run), time.monotonic()))
            if self._stopping and not told_to_stop:
                told_to_stop = True
                for started in self.state.running:
                    started.job.terminate()
            self._reap()
            if time.monotonic() >= next_tick:
                tick(self.state, self.state.flops_left(self._waiting))
                next_tick = time.monotonic() + TICK_SECONDS
            time.sleep(POLL_SECONDS)
        return self.state

    def _next(self) -> PlannedRun | None:
        """The first run that need not wait for another; those whose run has not been finished never start."""
        ahead = {run.name for run in self._waiting} | {started.run.name for started in self.state.running}
        ahead |= {*self.state.failed, *self.state.stopped}
        return next((run for run in self._waiting if run.after not in ahead), None)

    def _reap(self) -> None:
        for started in list(self.state.running):
            code = started.job.poll()
            if code is None:
                continue
            self.state.running.remove(started)
            if code == 0:
                self.state.finished.append(started.run)
            elif code == EXIT_PREEMPTED or (self._stopping and code < 0):
                # Saved, or killed by the signal before it could react: the next start goes on from there.
                self.state.stopped.append(started.run.name)
            else:
                self.state.failed[started.run.name] = code
            self._ended(started, code, self.state, self.state.flops_left(self._waiting))
