"""The directory OUTPUT.parts, which the processes of an indexing job share: lock, plan, finished units."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_dlm.data.preprocessing.part_files import Claim, Part
from megatron_dlm.data.shards.manifest import shard_path
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.files import write_json

LOCK, PLAN, STOP, JOIN = "lock", "plan.json", "stop", "join"
SET_UP_SECONDS = 10.0


class Workspace:
    """Directory that the processes of an indexing job share; opened by `open_workspace`."""

    def __init__(self, directory: Path, plan: dict[str, Any], num_units: int) -> None:
        self.directory = directory
        self.plan_sha256 = sha256_of_plan(plan)
        self.parts = [Part(directory, index) for index in range(num_units)]

    def stop(self) -> None:
        """Tell the other processes to stop."""
        (self.directory / STOP).touch()

    def is_stopped(self) -> bool:
        """Whether some process has failed."""
        return (self.directory / STOP).exists()

    def is_done(self) -> bool:
        """Whether all units are encoded."""
        return all(part.is_done() for part in self.parts)

    def exists(self) -> bool:
        """False once a process that shares the work has joined the parts."""
        return self.directory.exists()

    def join_claim(self) -> Claim:
        """The lock that a process must take before it joins the parts."""
        return Claim(self.directory / JOIN)

    def remove(self) -> None:
        """Remove the directory; it is renamed first, so it disappears for other processes at once."""
        stem = f"{self.directory.name}.old-"
        self.directory.rename(self.directory.with_name(f"{stem}{uuid.uuid4().hex}"))
        # What a killed process has left too; another one may be removing it at the same time.
        for doomed in self.directory.parent.glob(f"{stem}*"):
            shutil.rmtree(doomed, ignore_errors=True)


def sha256_of_plan(plan: dict[str, Any]) -> str:
    """SHA-256 of a plan, which identifies the indexing job."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


@contextmanager
def open_workspace(
    output: Path, plan: dict[str, Any], num_units: int, *, shared: bool
) -> Iterator[Workspace]:
    """Lock the workspace against processes that do not share the work, and find units already encoded.

    Args:
        output: prefix of the shard.
        plan: JSON object of everything that determines the bytes; parts of another plan are removed.
        num_units: number of units in the plan.
        shared: whether other processes share the work.

    Yields:
        The workspace; the next call resumes from the units left in it when the process ends.

    Raises:
        InputError: another process is at work there, or those that share the work have another plan.
    """
    directory = shard_path(output, ".parts")
    lock, alone = _lock(directory, shared=shared)
    try:
        if alone:
            _set_up(directory, plan)
            if shared:
                fcntl.flock(lock, fcntl.LOCK_SH)
        elif _read(directory / PLAN) != plan:
            raise InputError(f"output: {directory}: other processes work there on another job")
        yield Workspace(directory, plan, num_units)
    finally:
        os.close(lock)


def _set_up(directory: Path, plan: dict[str, Any]) -> None:
    if _read(directory / PLAN) != plan:
        for leftover in directory.iterdir():
            if leftover.name != LOCK:
                leftover.unlink()
        write_json(directory / PLAN, plan)
    (directory / STOP).unlink(missing_ok=True)


def _lock(directory: Path, *, shared: bool) -> tuple[int, bool]:
    """A descriptor that holds the lock until it is closed, and whether no other process has it too."""
    deadline = time.monotonic() + SET_UP_SECONDS
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        for mode in (fcntl.LOCK_EX, fcntl.LOCK_SH) if shared else (fcntl.LOCK_EX,):
            with suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
                # A process that was done may have removed the directory in between.
                if os.fstat(descriptor).st_ino == os.stat(directory / LOCK).st_ino:
                    return descriptor, mode == fcntl.LOCK_EX
        os.close(descriptor)
        if not shared or time.monotonic() > deadline:
            raise InputError(f"output: {directory}: another process is writing there")
        # One that shares the work may be setting up.
        time.sleep(0.05)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
