"""`megatron-dlm scaling run GRID`."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from megatron_dlm.cli.arguments import parse
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from megatron_dlm.scaling.run_list import PlannedRun
    from megatron_dlm.scaling.run_queue import Job, QueueState, Started

LOGS = "logs"
PRELOADED = "megatron_dlm.cli.preload"


@dataclass(frozen=True, kw_only=True)
class RunGridConfig:
    """Train the runs of a grid that are missing, on this machine.

    Each run is one process, which is forked from a process that has imported everything: a run starts within
    about a second. What a run prints goes to GRID/logs/. GRID/points.csv has the results so far; a run that
    is in it is done, even if its directory has been deleted. SIGTERM, SIGINT or SIGHUP saves what runs and
    ends with exit code 3; the same command goes on.
    """

    grid: Annotated[Path, tyro.conf.Positional]
    """Directory with runs.json, as `megatron-dlm scaling plan` writes it."""
    jobs: int = 1
    """Runs at a time; each takes parallel.intra_op_threads processors of a CPU."""
    launch: str = ""
    """Command that starts a run in place of one process here, such as "examples/torchrun/train.sh"; recipe
    and options are appended."""
    families: tuple[str, ...] = ()
    """Families to train; default: all."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise InputError(f"jobs: {self.jobs} is below 1")


def run(arguments: list[str]) -> int:
    """Parse, train what is missing; returns the exit code."""
    return train_missing(parse(RunGridConfig, arguments, verb="scaling run"))


def train_missing(config: RunGridConfig) -> int:
    """Train the runs of a grid that are missing, and collect.

    Args:
        config: grid and how to train it.

    Returns:
        Exit code: 1 if a run failed, 3 if a signal stopped the queue.
    """
    from megatron_dlm.platform.exit_codes import EXIT_PREEMPTED
    from megatron_dlm.scaling.run_list import read_run_list
    from megatron_dlm.scaling.run_queue import RunQueue

    grid = read_run_list(config.grid)
    waiting = _missing(config, grid.runs)
    done = len(grid.runs) - len(waiting)
    print(f"{config.grid}: {done} of {len(grid.runs)} runs are done or not asked for", flush=True)
    total = sum(each.own_flops for each in waiting)
    teller = _Teller(config.grid, len(waiting), total)
    with _progress(total) as (progress, task):
        queue = RunQueue(waiting, _starter(config), config.jobs, teller.ended)

        def tick(state: QueueState, left: float) -> None:
            names = ", ".join(started.run.name for started in state.running)
            progress.update(task, completed=total - left, description=names or "done")

        with _stopping(queue.stop):
            state = queue.work(tick)
    teller.collect()
    for name, code in state.failed.items():
        print(f"failed: {name}: exit code {code}; see {config.grid / LOGS / name}.log", file=sys.stderr)
    if state.failed:
        return 1
    unfinished = state.total - len(state.finished)
    if unfinished:
        print(f"stopped with {unfinished} runs left, exit code {EXIT_PREEMPTED}; the same command goes on")
        return EXIT_PREEMPTED
    return 0


def _missing(config: RunGridConfig, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    from megatron_dlm.scaling.collect import read_results
    from megatron_dlm.scaling.run_list import POINTS
    from megatron_dlm.scaling.run_queue import is_finished

    families = {each.family for each in runs}
    for name in config.families:
        if name not in families:
            raise InputError(f"families: {name!r} is not one of {', '.join(sorted(families))}")
    collected = {result.run for result in read_results(config.grid / POINTS)}
    return [
        each
        for each in runs
        if each.family in (config.families or families)
        and each.name not in collected
        and not is_finished(each.directory)
    ]


class _Teller:
    """Prints a line for each run that has ended, and keeps the table of results."""

    def __init__(self, grid: Path, total: int, total_flops: float) -> None:
        self._grid, self._total, self._total_flops = grid, total, total_flops
        self._began_at = time.monotonic()

    def ended(self, started: Started, code: int, state: QueueState, left: float) -> None:
        """One run has ended."""
        from megatron_dlm.telemetry.writers import duration, read_metrics

        now, trained = time.monotonic(), self._total_flops - left
        eta = f" | ETA {duration((now - self._began_at) * left / trained)}" if left and trained else ""
        result = f"exit code {code}"
        if code == 0:
            entries = read_metrics(started.run.directory)
            bounds = [entry["nats_per_token"] for entry in entries if entry["kind"] == "validation"]
            result = f"{bounds[-1]:.4f} nats/token"
        ended = len(state.finished) + len(state.failed) + len(state.stopped)
        print(
            f"{ended}/{self._total} {started.run.name}: {result} in {duration(now - started.began_at)}{eta}",
            flush=True,
        )
        if code == 0:
            from megatron_dlm.scaling.collect import FoundRun, add_results, collect
            from megatron_dlm.scaling.run_list import POINTS

            results, _ = collect([FoundRun(started.run.directory, started.run)])
            add_results(self._grid / POINTS, results)

    def collect(self) -> None:
        """Write the results of all runs that can be compared, and name the others."""
        from megatron_dlm.cli.scaling_collect import tell_problems
        from megatron_dlm.scaling.collect import add_results, collect, find_runs
        from megatron_dlm.scaling.run_list import POINTS

        here = [found for found in find_runs([self._grid]) if found.directory.is_dir()]
        results, problems = collect(here)
        rows = add_results(self._grid / POINTS, results, problems)
        tell_problems(problems)
        print(f"{self._grid / POINTS}: {len(rows)} rows")


@contextmanager
def _progress(total_flops: float) -> Iterator[tuple[Progress, TaskID]]:
    """A bar over the FLOPs of all runs; nothing where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.1f}% of FLOPs"))
    console = Console(stderr=True)
    eta = TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(
        *columns, eta, console=console, disable=not sys.stderr.isatty(), speed_estimate_period=600
    ) as progress:
        yield progress, progress.add_task("", total=total_flops)


@contextmanager
def _stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Have signals end the queue."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, lambda *_: stop()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _starter(config: RunGridConfig) -> Callable[[PlannedRun], Job]:
    """What starts a run: a fork here, or the asked command."""
    logs = config.grid / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    if config.launch:
        return lambda run: _Launched(shlex.split(config.launch), run, logs)
    from megatron_dlm.platform.subprocess_lifetime import start_from_server

    def start(run: PlannedRun) -> Job:
        return _Forked(start_from_server(PRELOADED, _train, run.words, str(logs / f"{run.name}.log")))

    return start


class _Forked:
    """A run in a forked process."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    def poll(self) -> int | None:
        """Its exit code, minus the signal that has killed it."""
        return self._process.exitcode

    def terminate(self) -> None:
        """Ask it to save and end."""
        self._process.terminate()


class _Launched:
    """A run that a command has started."""

    def __init__(self, command: Sequence[str], run: PlannedRun, logs: Path) -> None:
        with (logs / f"{run.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *run.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Its exit code."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask all its processes to save and end."""
        os.killpg(self._process.pid, signal.SIGTERM)


def _train(words: list[str], log: str) -> None:
    """Body of a forked process: `megatron-dlm train`, with its output in a file."""
    from megatron_dlm.cli.main import run_and_exit
    from megatron_dlm.cli.train import run as train

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    run_and_exit("megatron-dlm train", lambda: train(words))
