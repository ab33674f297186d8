"""Encodes an indexing job's units, in this process or in worker processes, and reports progress."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_dlm.data.preprocessing.input_files import Source
from megatron_dlm.data.preprocessing.part_files import EncodingRules, PartRecord, write_part
from megatron_dlm.data.preprocessing.work_units import Unit
from megatron_dlm.data.preprocessing.workspace import Workspace
from megatron_dlm.interfaces import InputError, TrainingError
from megatron_dlm.platform.subprocess_lifetime import fork

REPORT_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """An indexing job: the sources, their units and the encoding rules."""

    sources: list[Source]
    units: list[Unit]
    rules: EncodingRules

    def stored_bytes(self, index: int) -> int:
        """Bytes of the unit's part of its source, as stored (compressed where the file is)."""
        unit = self.units[index]
        source = self.sources[unit.source]
        if source.format != "parquet":
            return unit.end - unit.start
        groups = max(other.end for other in self.units if other.source == unit.source)
        return source.num_bytes * (unit.end - unit.start) // max(1, groups)


@dataclass(frozen=True)
class IndexProgress:
    """Progress of all processes that share the work; speeds are averages since this process began."""

    stored_bytes: int
    """Bytes of the sources, as stored, in finished units."""
    total_bytes: int
    documents: int
    tokens: int
    text_bytes_per_second: float
    documents_per_second: float
    tokens_per_second: float
    eta_seconds: float
    """Infinite as long as no unit has been finished."""


Report = Callable[[IndexProgress], None]
OnBatch = Callable[[PartRecord | None], None]
"""Called with the counts of a unit so far, and with None once the unit is finished."""


def encode_units(job: Job, space: Workspace, first: int, on_batch: OnBatch) -> None:
    """Encode units that no other process has encoded or claimed; returns when none is left.

    Args:
        job: indexing job.
        space: workspace that the processes share.
        first: unit to begin with, chosen so that processes rarely ask for the same one.
        on_batch: see `OnBatch`.

    Raises:
        InputError: see `write_part`; the other processes are told to stop.
    """
    count = len(job.units)
    try:
        for index in [*range(first, count), *range(first)]:
            part, unit = space.parts[index], job.units[index]
            if space.is_stopped() or part.is_done():
                continue
            with part.claim() as claim:
                if claim.take() and not part.is_done():
                    write_part(part, job.sources[unit.source], unit, job.rules, on_batch)
                    on_batch(None)
    except FileNotFoundError:
        # Another process has joined the parts and removed them.
        if space.exists():
            raise
    except BaseException:
        with suppress(OSError):
            space.stop()
        raise


class ProgressReporter:
    """Sums the records of finished units, whoever wrote them, and this process's unfinished ones."""

    def __init__(self, job: Job, space: Workspace, report: Report) -> None:
        self._job, self._space, self._report = job, space, report
        self._done: dict[int, PartRecord] = {}
        self._total = sum(job.stored_bytes(index) for index in range(len(job.units)))
        self._started_at = time.monotonic()
        self._reported_at = self._started_at
        self._before = self._sums()

    def _sums(self) -> tuple[int, ...]:
        """Stored bytes, bytes, documents and tokens of all finished units."""
        with suppress(FileNotFoundError):
            for index, part in enumerate(self._space.parts):
                if index not in self._done and part.is_done():
                    self._done[index] = part.read_record()
        records = self._done.values()
        return (
            sum(self._job.stored_bytes(index) for index in self._done),
            sum(record.num_bytes for record in records),
            sum(sum(record.num_documents) for record in records),
            sum(sum(record.num_tokens) for record in records),
        )

    def tell(self, unfinished: Sequence[int] = (0, 0, 0)) -> None:
        """Report progress if the last report is at least REPORT_SECONDS old.

        Args:
            unfinished: bytes, documents and tokens of units that this process has begun.
        """
        if time.monotonic() - self._reported_at < REPORT_SECONDS:
            return
        self._reported_at = time.monotonic()
        seconds = self._reported_at - self._started_at
        stored, *finished = self._sums()
        num_bytes, documents, tokens = (sum(pair) for pair in zip(finished, unfinished, strict=True))
        new = stored - self._before[0]
        self._report(
            IndexProgress(
                stored_bytes=stored,
                total_bytes=self._total,
                documents=documents,
                tokens=tokens,
                text_bytes_per_second=(num_bytes - self._before[1]) / seconds,
                documents_per_second=(documents - self._before[2]) / seconds,
                tokens_per_second=(tokens - self._before[3]) / seconds,
                eta_seconds=(self._total - stored) / (new / seconds) if new else math.inf,
            )
        )


def encode_here(job: Job, space: Workspace, first: int, progress: ProgressReporter) -> None:
    """Encode in this process; see `encode_units`."""

    def on_batch(record: PartRecord | None) -> None:
        record = record or PartRecord()
        progress.tell((record.num_bytes, sum(record.num_documents), sum(record.num_tokens)))

    encode_units(job, space, first, on_batch)


def encode_in_children(
    job: Job, space: Workspace, workers: int, first: int, progress: ProgressReporter
) -> None:
    """Encode in worker processes that this process starts.

    Args:
        job: indexing job.
        space: workspace that the processes share.
        workers: number of worker processes.
        first: unit to begin with.
        progress: reporter that this process calls for all workers.

    Raises:
        InputError: raised in a worker process.
        OSError: raised in a worker process, for example because the disk is full.
        TrainingError: a worker process has died.
    """
    counters = [multiprocessing.RawArray("q", 3) for _ in range(workers)]
    children: dict[Any, Connection] = {}
    for index in range(workers):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        begin = (first + index * len(job.units) // workers) % len(job.units)
        child = fork(_encode_as_child, job, space, begin, counters[index], sender)
        sender.close()
        children[child] = receiver
    try:
        running = set(children)
        while running:
            wait([child.sentinel for child in running], timeout=REPORT_SECONDS / 4)
            progress.tell([sum(column) for column in zip(*counters, strict=True)])
            for child in [child for child in running if child.exitcode is not None]:
                running.remove(child)
                _raise_what_happened(child, children[child], space)
    finally:
        for child in children:
            child.kill()
            child.join()


def _encode_as_child(job: Job, space: Workspace, first: int, counters: Any, outcome: Connection) -> None:
    def on_batch(record: PartRecord | None) -> None:
        record = record or PartRecord()
        counters[:] = [record.num_bytes, sum(record.num_documents), sum(record.num_tokens)]

    try:
        encode_units(job, space, first, on_batch)
    except (InputError, OSError) as error:
        outcome.send(error)
        raise SystemExit(1) from error


def _raise_what_happened(child: Any, outcome: Connection, space: Workspace) -> None:
    if child.exitcode == 0:
        return
    space.stop()
    error: Exception | None = None
    with suppress(EOFError, OSError):
        error = outcome.recv() if outcome.poll() else None
    raise error or TrainingError(
        f"a worker process ended with exit code {child.exitcode}; finished units are kept; run the same "
        "command again to resume"
    )
