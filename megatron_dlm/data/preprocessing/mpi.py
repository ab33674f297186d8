"""An indexing job shared by the processes that mpirun has started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_dlm.interfaces import InputError


def communicator() -> Any:
    """All processes of the job.

    Returns:
        mpi4py's COMM_WORLD.

    Raises:
        InputError: mpi4py or an MPI library is missing.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"mpi: mpi4py cannot be used: {error}; install the extra `mpi` and an MPI library"
        ) from error
    return MPI.COMM_WORLD


def together(world: Any, action: Callable[[], None]) -> None:
    """Run `action` on every process and wait for all; where one fails, all raise its error.

    Args:
        world: communicator from `communicator`.
        action: work of this process.

    Raises:
        Exception: error of the lowest rank that failed.
    """
    error: Exception | None = None
    try:
        action()
    except Exception as failure:
        error = failure
    first = next((failure for failure in world.allgather(error) if failure is not None), None)
    if first is not None:
        raise first
