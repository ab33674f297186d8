"""torchrun's agent of one node, which knows what the exit codes of our processes mean.

torch's own starts the processes again after any failure, a wrong option too, and counts each node that joins
a job late from zero, so that old and new processes look for each other in different places of the store.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
)

from megatron_dlm.platform.exit_codes import EXIT_LOST_RANK, EXIT_PREEMPTED, EXIT_SAVE_FAILED
from megatron_dlm.platform.rendezvous import ATTEMPT, bound_silence
from megatron_dlm.platform.restarts import PROGRESS_FILE

STOP_SECONDS = 30
"""How long processes have to end after one of them has failed."""
SAVE_SECONDS = 1800
"""How long processes have to save and end when nodes join."""
ERRORS = {1, 2, EXIT_SAVE_FAILED}
"""Exit codes of processes that have failed by themselves."""
LEAVING = "leaving"
"""Key in the store of one start of the job: a signal takes a node out, and the others go on without it."""


class Agent(LocalElasticAgent):
    """Starts the processes of one node, and starts them again where that can help.

    Again after a process that a signal has killed and after a lost rank, at most `max_restarts` times in a
    row without a new checkpoint; and, with c10d rendezvous, when nodes have joined or left, after all
    processes have saved. Never after an error of a process.
    """

    current: Agent | None = None
    """The agent of this process."""
    may_resize = False
    """Whether the job's number of nodes is a range."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Agent.current = self
        self._signal: int | None = None
        self.is_stopping = False
        """The agent itself has sent the processes a signal; a second one would end them unsaved."""
        spec = self._worker_group.spec
        # A job on one machine has this rendezvous too.
        self._is_elastic = Agent.may_resize and spec.rdzv_handler.get_backend() == "c10d"
        self._scratch = tempfile.TemporaryDirectory(prefix="megatron-dlm-agent-")
        self._progress = Path(self._scratch.name) / "saved"
        self._starts = 0
        self._closed_at: float | None = None
        os.environ[PROGRESS_FILE] = str(self._progress)

    @classmethod
    def has_started(cls) -> bool:
        """Whether this node's processes have been started."""
        return cls.current is not None and cls.current._starts > 0

    def take_signal(self, number: int) -> None:
        """Remember that a signal asks this node's processes to stop, and tell the other nodes.

        Args:
            number: of the signal, which the caller passes on to the processes.
        """
        self._signal = number
        if self._is_elastic and self._worker_group.store is not None:
            # Nodes that cannot be told end with this one.
            with suppress(RuntimeError, ValueError):
                self._worker_group.store.set(LEAVING, "1")

    def _rendezvous(self, worker_group: Any) -> None:
        if self._is_elastic:
            # torch keeps the address of the first meeting: a node that joins later waits for it in vain, and
            # the others look for rank 0 where it no longer is.
            worker_group.spec.rdzv_handler._bootstrap_store_info = None
        self._leave_if_asked()
        super()._rendezvous(worker_group)
        self._leave_if_asked()
        bound_silence()

    def _leave_if_asked(self) -> None:
        """Do not start processes that a signal has asked to stop, while the others were being stopped."""
        if self._signal is not None:
            raise SignalException("stopped", signal.Signals(self._signal))

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        if self._is_elastic:
            # Each meeting of the nodes has a store of its own: the first name put there is that of all.
            name = worker_group.store.compare_set("attempt", "", uuid.uuid4().hex).decode()
            os.environ[ATTEMPT] = name
            if worker_group.group_rank == 0:
                _tell(self._describe_start(worker_group))
        self._starts += 1
        self._progress.unlink(missing_ok=True)
        return super()._start_workers(worker_group)

    def _describe_start(self, worker_group: Any) -> str:
        nodes, per_node = worker_group.group_world_size, worker_group.spec.local_world_size
        again = " again" if self._starts else ""
        return f"starts{again} on {nodes} node{'s' if nodes > 1 else ''} x {per_node} processes"

    def _stop_workers(self, worker_group: Any) -> None:
        self.is_stopping = True
        has_failed = worker_group.state in (WorkerState.FAILED, WorkerState.UNHEALTHY)
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGTERM, timeout=STOP_SECONDS if has_failed else SAVE_SECONDS)
        super()._stop_workers(worker_group)
        self.is_stopping = False

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY and self._is_elastic:
            self._end_with_the_others()
        if result.state != WorkerState.FAILED:
            return result
        codes = {failure.exitcode for failure in result.failures.values()}
        if self._signal is not None and self._is_elastic and not codes & ERRORS:
            # The exception of a signal is the one after which the others may go on.
            self._leave_if_asked()
        if self._signal is not None or not self._may_help(codes):
            self._remaining_restarts = 0
        elif codes == {EXIT_PREEMPTED}:
            # Other nodes' change, which is not counted.
            self._remaining_restarts += 1
        elif self._progress.exists():
            self._remaining_restarts = max(self._remaining_restarts, worker_group.spec.max_restarts)
        return result

    def _end_with_the_others(self) -> None:
        """Raise RendezvousError if the other nodes have ended the job, or if the rendezvous is lost."""
        try:
            if not self._worker_group.spec.rdzv_handler.is_closed():
                self._closed_at = None
                return
        except RendezvousConnectionError:
            # Without it processes cannot save, and would only say the same.
            assert self._pcontext is not None
            self._pcontext.close(signal.SIGKILL)
            raise
        now = time.monotonic()
        self._closed_at = self._closed_at or now
        if now - self._closed_at > STOP_SECONDS:
            raise RendezvousClosedError("the other nodes have ended")

    def _may_help(self, codes: set[int]) -> bool:
        """Whether a new start may help after processes have ended with these exit codes."""
        if codes == {EXIT_PREEMPTED}:
            return self._is_elastic and self._nodes_change()
        return all(code < 0 or code in (EXIT_LOST_RANK, EXIT_PREEMPTED) for code in codes)

    def _nodes_change(self) -> bool:
        """Whether nodes wait to join, or one leaves; else all processes were asked to stop."""
        try:
            if self._worker_group.spec.rdzv_handler.num_nodes_waiting():
                return True
            store = self._worker_group.store
            return store is not None and store.check([LEAVING])
        except (RendezvousError, RuntimeError, ValueError):
            # The store went with its node.
            return False


def _tell(message: str) -> None:
    print(f"torchrun: {message}", file=sys.stderr, flush=True)
