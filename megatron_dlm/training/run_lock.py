"""A lock that keeps other jobs out of a run's directory."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import filelock

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.files import write_json

logger = logging.getLogger(__name__)
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "TORCHELASTIC_RUN_ID")
"""Environment variables in which schedulers and launchers name a job."""


class RunLock:
    """Lock on a run's directory, held from `acquire` until the process ends, even if it is killed.

    The kernel, or the file server of shared storage, releases the lock (flock) when its holder dies.
    """

    def __init__(self, directory: Path) -> None:
        self._holder = directory / "lock.json"
        self._lock = filelock.FileLock(directory / "lock")

    def acquire(self, timeout_seconds: float) -> None:
        """Take the lock; one process of a job calls it.

        Args:
            timeout_seconds: how long to wait for another job to leave.

        Raises:
            InputError: another job holds it: its host, process and job id.
        """
        self._holder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=timeout_seconds)
        except filelock.Timeout as error:
            holder = self._holder.read_text(encoding="utf-8") if self._holder.exists() else "{}"
            raise InputError(
                f"directory: {self._holder.parent} is in use by another job: {' '.join(holder.split())}"
            ) from error
        except NotImplementedError:
            where = self._holder.parent
            logger.warning(f"{where} is on storage without locks; keep other jobs out")
            return
        job = next((os.environ[name] for name in JOB_VARIABLES if name in os.environ), None)
        write_json(self._holder, {"host": socket.gethostname(), "pid": os.getpid(), "job": job})
