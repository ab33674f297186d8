"""A training run from configuration to exit: check, start, resume, fit."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from megatron_dlm.families.schedules import training_objective
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.failure_report import naming_the_rank_at_fault
from megatron_dlm.platform.gpu import record_memory
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel import ParallelState, on_first_rank, start_parallel, stop_parallel
from megatron_dlm.platform.rendezvous import report_end, wait_for_the_end
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.datasets import RunData, open_data
from megatron_dlm.run.run_file import refuse_foreign_directory, write_run_file
from megatron_dlm.run.run_record import OutsideStart, RunRecord, checkpoint_root, read_run_record
from megatron_dlm.run.validation import check_device
from megatron_dlm.run.working_ranks import find_working_ranks
from megatron_dlm.training.announcement import Announcement
from megatron_dlm.training.run_lock import RunLock
from megatron_dlm.training.signals import StopSignals
from megatron_dlm.training.start import agree_on_start, find_start, restore

if TYPE_CHECKING:
    from megatron_dlm.training.progress import TrainingProgress
    from megatron_dlm.training.session import Session

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> bool:
    """Run, or continue, one training run; every process of the job calls it.

    Args:
        config: configuration of the run.

    Returns:
        True if the run reached its last step, False if it was asked to stop earlier and saved a checkpoint.

    Raises:
        InputError: the configuration, the data or the checkpoint to start from cannot be used, or another job
            is in the directory; no step has been made then.
    """
    signals = StopSignals()
    started_as = detect_environment()
    working = find_working_ranks(config, started_as.world_size)
    data = check_start(config, working.count)
    if started_as.rank >= working.count:
        # Beside ranks that work it ends with them: a process that ends takes those of its node with it.
        signals.run_has_ended = started_as.rank - started_as.local_rank < working.count
        return wait_for_the_end(started_as, config.parallel.collective_timeout_seconds)
    environment = working.place(started_as)
    if working.idle and environment.rank == 0:
        logger.warning(working.describe())
    parallel = start_parallel(environment, config.parallel)
    signals.ranks_have_met = True
    with naming_the_rank_at_fault(parallel.rank, parallel.world_size):
        check_device(config, parallel.device)
        lock = RunLock(config.directory)

        def take_directory() -> None:
            try:
                lock.acquire(config.checkpoint.lock_timeout_seconds)
                write_run_file(config, data, environment)
            except OSError as error:
                reason = error.strerror or error
                raise InputError(f"directory: {config.directory}: cannot be written: {reason}") from error

        on_first_rank(parallel, take_directory)
        start = find_start(config, data)
        agree_on_start(start, parallel)
        is_done = train_from(start, config, data, parallel, signals)
        signals.run_has_ended = True
        if working.idle and parallel.rank == 0:
            report_end(is_done=is_done, idle_ranks=working.idle)
        # Not after an error: the other ranks may never arrive.
        stop_parallel()
    return is_done


def check_start(config: RunConfig, processes: int) -> RunData:
    """Check a run's configuration, data and start; needs no other process and no device.

    Args:
        config: configuration of the run.
        processes: processes of the job.

    Returns:
        The opened data.

    Raises:
        InputError: one of them cannot be used.
    """
    find_working_ranks(config, processes)
    refuse_foreign_directory(config.directory)
    data = open_data(config.data)
    # Refuses what this vocabulary is too small for.
    training_objective(config.objective, data.vocabulary)
    if data.has_prompts and config.parallel.cuda_graphs:
        raise InputError("parallel.cuda_graphs: True, and rows of prompts have masks of their own")
    if data.has_prompts:
        config.objective.check_prompts(training=data.train.has_prompts)
    # What cannot be used is refused before anything starts; the lock's last holder may have saved since.
    find_start(config, data)
    return data


def train_from(
    start: RunRecord | OutsideStart | None,
    config: RunConfig,
    data: RunData,
    parallel: ParallelState,
    signals: StopSignals,
) -> bool:
    """Build the model, load what the run starts from, and train; all ranks call it.

    Args:
        start: result of `find_start`.
        config: configuration of the run.
        data: its data.
        parallel: rank and process groups of this process.
        signals: signal handlers that ask the run to stop.

    Returns:
        True if the run reached its last step.
    """
    told = Announcement(config, data, parallel)
    if told.has_ended_before(start):
        return True
    from megatron_dlm.training.hooks.profiling import PROFILES
    from megatron_dlm.training.session import Session

    told.begins()
    if config.telemetry.memory_snapshot:
        record_memory(config.directory / PROFILES / f"memory-rank-{parallel.rank}.pickle")
    session = Session(config, data, parallel)
    progress = restore(session, start)
    told.starts_from(start, progress)
    go_on(session, progress, signals)
    for chunk in session.denoiser.chunks:
        chunk.forget_recordings()
    return told.ends(progress)


def go_on(session: Session, progress: TrainingProgress, signals: StopSignals) -> None:
    """Train a session with all hooks, to its last step or until it is asked to stop.

    Args:
        session: model, optimizer and data.
        progress: step and samples to start from; updated after each step.
        signals: signal handlers that ask the run to stop.
    """
    from megatron_dlm.training.hooks.checkpoint import CheckpointHook
    from megatron_dlm.training.hooks.evaluation import EvaluationHook
    from megatron_dlm.training.hooks.generation import GenerationHook
    from megatron_dlm.training.hooks.logging import LoggingHook
    from megatron_dlm.training.hooks.non_finite import NonFiniteHook
    from megatron_dlm.training.hooks.profiling import ProfilingHook
    from megatron_dlm.training.hooks.replicas import ReplicaHook
    from megatron_dlm.training.hooks.requests import RequestHook
    from megatron_dlm.training.hooks.telemetry import Telemetry
    from megatron_dlm.training.hooks.watchdog import WatchdogHook, stop_watching
    from megatron_dlm.training.loop import fit

    checkpoints = CheckpointHook(checkpoint_root(session.config), progress.step, session.parallel)

    def roll_back() -> TrainingProgress:
        checkpoints.finish(session)
        complete = on_first_rank(session.parallel, lambda: checkpoint_root(session.config).complete())
        if not complete:
            raise InputError("training.on_non_finite: rollback, and no checkpoint to go back to")
        return restore(session, read_run_record(complete[-1]))

    telemetry = Telemetry(session, progress.step)
    # Evaluation and metrics before the checkpoint: what it holds is not done or logged again after a kill.
    hooks = [
        WatchdogHook(),
        NonFiniteHook(roll_back),
        ReplicaHook(),
        RequestHook(signals),
        EvaluationHook(telemetry),
        LoggingHook(telemetry),
        checkpoints,
        # By the checkpoint that was just saved.
        GenerationHook(telemetry, checkpoints),
        ProfilingHook(),
    ]
    try:
        fit(session, progress, hooks)
    finally:
        session.stop_reading()
        stop_watching()
