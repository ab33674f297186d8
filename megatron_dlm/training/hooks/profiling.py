"""A profile of a few steps: a trace for Perfetto or Chrome, and a table of the costliest operations."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_dlm.training.loop import Hook
from megatron_dlm.training.progress import StepReport, TrainingProgress
from megatron_dlm.training.session import Session

logger = logging.getLogger(__name__)
PROFILES = "profiles"
"""Directory in the run's directory."""
TABLE_ROWS = 40


class ProfilingHook(Hook):
    """Profiles `telemetry.profile_steps` on rank 0; on a GPU each of these steps is an NVTX range too.

    Writes RUN/profiles/steps-FIRST-LAST.json.gz and .txt. A step that is profiled takes longer.
    """

    def __init__(self) -> None:
        self._profiler: Any = None
        self._has_range = False

    def on_start(self, session: Session, progress: TrainingProgress) -> None:
        """Begin, if the first step is in the window."""
        self._begin_or_end(session, progress)

    def after_step(self, session: Session, progress: TrainingProgress, report: StepReport) -> None:
        """Begin or end where the window does."""
        self._begin_or_end(session, progress)

    def on_end(self, session: Session, progress: TrainingProgress) -> None:
        """Write what there is if the run ends within the window."""
        self._end(session)

    def _begin_or_end(self, session: Session, progress: TrainingProgress) -> None:
        window, parallel = session.config.telemetry.profiled_steps(), session.parallel
        if window is None or parallel.rank != 0:
            return
        self._close_range()
        is_inside = window[0] <= progress.step + 1 <= window[1]
        if self._profiler is not None and not is_inside:
            self._end(session)
        if is_inside and self._profiler is None:
            activities = [ProfilerActivity.CPU]
            if parallel.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()
        if is_inside and parallel.device.type == "cuda":
            torch.cuda.nvtx.range_push(f"step {progress.step + 1}")
            self._has_range = True

    def _close_range(self) -> None:
        if self._has_range:
            torch.cuda.nvtx.range_pop()
            self._has_range = False

    def _end(self, session: Session) -> None:
        self._close_range()
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        first, last = session.config.telemetry.profiled_steps() or (0, 0)
        place = session.config.directory / PROFILES / f"steps-{first}-{last}"
        order = "self_cuda_time_total" if session.parallel.device.type == "cuda" else "self_cpu_time_total"
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(f"{place}.json.gz")
            table = profiler.key_averages().table(sort_by=order, row_limit=TABLE_ROWS)
            place.with_name(place.name + ".txt").write_text(table, encoding="utf-8")
        except OSError as error:
            logger.warning(f"{place}: {error}; training goes on without the profile")
            return
        logger.info(
            f"profiled steps {first} to {last}: {place}.json.gz (chrome://tracing, Perfetto), {place}.txt"
        )
