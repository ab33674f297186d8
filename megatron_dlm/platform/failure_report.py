"""After a failure, the remaining ranks exchange reports to name the rank at fault, and print stacks."""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from megatron_dlm.interfaces import LostRankError, TrainingError

REPORT_SECONDS = 5.0
"""How long a failed rank waits for the reports of the others; who is silent longer is gone or hangs."""
STACKS_WANTED = "failure/stacks"
"""Key in the rendezvous store that asks every rank which still can to print the stacks of its threads."""
POLL_SECONDS = 1.0


@contextmanager
def naming_the_rank_at_fault(rank: int, world_size: int) -> Iterator[None]:
    """Turn the error of a broken collective into one that names the ranks that broke it.

    Args:
        rank: of this process in the default process group.
        world_size: ranks of the group.

    Yields:
        Nothing.

    Raises:
        LostRankError: another rank is gone or hangs, or connections broke.
        TrainingError: another rank has failed. What this rank did wrong passes unchanged.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    ended = threading.Event()
    watcher = threading.Thread(target=_print_stacks_on_demand, args=(ended,), daemon=True)
    watcher.start()
    try:
        yield
    # It is no Exception.
    except (Exception, CheckpointException) as error:
        broken = _is_broken_collective(error)
        ended.set()
        # A store whose process is frozen answers never.
        faulthandler.dump_traceback_later(4 * REPORT_SECONDS, exit=True)
        if broken and "timed out" in str(error).lower():
            # Someone hangs: where everyone was tells why.
            traceback.print_exception(error)
            _ask_for_stacks()
        reports = _exchange_reports(rank, world_size, str(error), broken=broken)
        if not broken:
            if rank == 0:
                _let_others_read(world_size)
            raise
        raise _fault(reports, world_size) from error
    finally:
        ended.set()
        watcher.join(REPORT_SECONDS)
        faulthandler.cancel_dump_traceback_later()


def _print_stacks_on_demand(ended: threading.Event) -> None:
    """A thread of each rank, for the case that its main thread hangs."""
    from torch.distributed.distributed_c10d import _get_default_store

    # A connection of its own: one that waits for an answer keeps other threads waiting too.
    store = _get_default_store().clone()  # type: ignore[attr-defined]
    while not ended.wait(POLL_SECONDS):
        try:
            if store.check([STACKS_WANTED]):
                print("another rank waited in vain; stacks of this one:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                return
        except (RuntimeError, ValueError):
            # The store went with rank 0.
            return


def _ask_for_stacks() -> None:
    from torch.distributed.distributed_c10d import _get_default_store

    with suppress(RuntimeError, ValueError):
        _get_default_store().set(STACKS_WANTED, "")


def _let_others_read(world_size: int) -> None:
    """Wait until all ranks have failed too, or for REPORT_SECONDS: the store may end with this process."""
    from torch.distributed.distributed_c10d import _get_default_store

    deadline = time.monotonic() + REPORT_SECONDS
    with suppress(RuntimeError, ValueError):
        store = _get_default_store()
        while time.monotonic() < deadline and not store.check([f"failure/{r}" for r in range(world_size)]):
            time.sleep(0.05)
        # They read this rank's report as soon as they have posted theirs.
        time.sleep(0.2)


def _is_broken_collective(error: BaseException) -> bool:
    import torch.distributed as dist
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException):
        return any(_is_broken_collective(cause) for cause, _ in error.failures.values())
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _exchange_reports(
    own_rank: int, world_size: int, message: str, *, broken: bool
) -> dict[int, dict[str, Any]]:
    """Reports of the ranks that answer in time, by rank; a rank that failed by itself only posts its own."""
    from torch.distributed.distributed_c10d import _get_default_store

    reports: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + REPORT_SECONDS
    try:
        store = _get_default_store()
        store.set(f"failure/{own_rank}", json.dumps({"message": message, "broken": broken}))
        while broken and len(reports) < world_size and time.monotonic() < deadline:
            for rank in set(range(world_size)) - set(reports):
                if store.check([f"failure/{rank}"]):
                    reports[rank] = json.loads(store.get(f"failure/{rank}"))
            time.sleep(0.05)
    except (RuntimeError, ValueError):
        # The store went with rank 0, whose process keeps it where no launcher does.
        pass
    return reports


def _fault(reports: dict[int, dict[str, Any]], world_size: int) -> TrainingError:
    failed = {rank: report["message"] for rank, report in reports.items() if not report["broken"]}
    if failed:
        return TrainingError(
            "; ".join(f"rank {rank} failed: {message}" for rank, message in sorted(failed.items()))
        )
    silent = [str(rank) for rank in range(world_size) if rank not in reports]
    if not reports:
        silent = ["0"]
    if not silent:
        told = "; ".join(f"rank {rank}: {report['message']}" for rank, report in sorted(reports.items()))
        return LostRankError(f"connection between ranks lost: {told}")
    return LostRankError(f"rank {', '.join(silent)} is gone or hangs: no answer within {REPORT_SECONDS:g} s")
