"""Writes each process's share of a checkpoint from a child process, so that training can go on meanwhile."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dlm.checkpointing.host_memory import HostMemory
from megatron_dlm.checkpointing.optimizer_state import SavePlanner, TensorChunks
from megatron_dlm.platform.files import sha256_of
from megatron_dlm.platform.megatron import (
    CHECKPOINT_BACKEND,
    CHECKPOINT_VERSION,
    agree_on_plan,
    by_checkpoint_key,
    torch_state,
)
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.platform.subprocess_lifetime import fork


@dataclass(frozen=True)
class Written:
    """Result of one rank's writing process: what it wrote, or an error message."""

    error: str = ""
    results: list[WriteResult] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 by file name."""


class _PathlessWriter(FileSystemWriter):
    """Leaves this machine's paths out of what it writes."""

    def storage_meta(self) -> None:
        """Nothing: it would be the path as an object, which our reader refuses to unpickle."""
        return


class SavePlans:
    """State kept from save to save of a run: which rank writes which tensors, and host memory for copies.

    Ranks agree on the plan at the first save, since nothing in it changes later.
    """

    def __init__(self, parallel: ParallelState) -> None:
        self.distribution = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy(CHECKPOINT_BACKEND, CHECKPOINT_VERSION), parallel.replica_group, True
        )
        self.agreed: tuple[SavePlan, Metadata] | None = None
        """Save plan of this rank, and metadata, which on rank 0 locate all tensors."""
        self.memory = HostMemory()


class ShareWriter:
    """Writes this process's share of a checkpoint.

    megatron-core's own save hangs if its writer process is killed; if rank 0 cannot write, the other ranks
    hang in a collective.
    """

    def __init__(
        self,
        directory: Path,
        weights: Any,
        pieces: Mapping[str, TensorChunks],
        plans: SavePlans,
        parallel: ParallelState,
    ) -> None:
        """Make the save plan if there is none, copy tensors from the GPU, write nothing; all ranks call it.

        Args:
            directory: an existing directory that all ranks share.
            weights: megatron-core's sharded tensors and objects; changed in place: one rank writes each.
            pieces: pieces of the optimizer's state, by key; no other rank has the same pieces.
            plans: state kept from the run's earlier saves; the first save fills in the plan.
            parallel: rank and process groups of this process.
        """
        self._directory = directory
        self._is_first = parallel.rank == 0
        plans.distribution.apply_saving_parallelization(weights)
        by_key = by_checkpoint_key(weights)
        sharded = [value for value in nested_values(by_key) if isinstance(value, ShardedTensor)]
        tensors = [tensor.data for tensor in sharded]
        tensors += [piece for each in pieces.values() for piece in each.tensors]
        self.num_bytes = sum(tensor.nbytes for tensor in tensors)
        self.error = ""
        """Error message if this rank cannot write its share; otherwise empty."""
        self._memory = plans.memory
        if parallel.device.type == "cuda":
            self._copy(tensors, sharded, pieces)
        self._planner = SavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        # Files are flushed to disk when written. Nothing is copied from a GPU while writing, which the child
        # has not: torch would open a stream for that wherever CUDA is available.
        self._writer = _PathlessWriter(
            directory, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0
        )
        state = torch_state(by_key, False) | pieces
        self._planner.set_up_planner(state, is_coordinator=self._is_first)
        self._writer.set_up_storage_writer(self._is_first)
        if plans.agreed is None:
            plans.agreed = self._agree()
        self._plan = self._planner.finish_plan(plans.agreed[0])
        self._metadata = replace(plans.agreed[1])
        self._process: Any = None
        self._outcome: Connection | None = None
        self._started_at = 0.0

    def _copy(
        self, tensors: Sequence[Tensor], sharded: Sequence[ShardedTensor], pieces: Mapping[str, TensorChunks]
    ) -> None:
        try:
            copies = iter(self._memory.hold(tensors))
        except MemoryError as error:
            # The other ranks must hear of it; until then the tensors stay where they are.
            self.error = str(error)
            return
        for tensor in sharded:
            tensor.data = next(copies)
        for each in pieces.values():
            each.replace([next(copies) for _ in each.tensors])

    def _agree(self) -> tuple[SavePlan, Metadata]:
        def own_plan() -> SavePlan:
            return self._writer.prepare_local_plan(self._planner.create_local_plan())

        def join(plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
            plans, metadata = self._planner.create_global_plan(plans)
            return self._writer.prepare_global_plan(plans), metadata

        return agree_on_plan(own_plan, join)

    def start(self) -> None:
        """Write from a child process, which sees memory as it is now."""
        self._outcome, child_end = multiprocessing.Pipe(duplex=False)
        try:
            self._process = fork(self._write, child_end)
        except OSError as error:
            # Told in `wait`, where the other ranks hear of it.
            child_end.send(Written(error=f"{self._directory}: no writing process: {error}"))
        child_end.close()
        self._started_at = time.monotonic()

    def _write(self, outcome: Connection) -> None:
        try:
            results = self._writer.write_data(self._plan, self._planner).wait()
            names = {result.storage_data.relative_path for result in results}
            digests = {name: sha256_of(self._directory / name) for name in names}
            outcome.send(Written(results=results, digests=digests))
        except Exception as error:
            outcome.send(Written(error=f"{self._directory}: {_first_cause(error)}"))

    def is_done(self, timeout_seconds: float) -> bool:
        """Whether this process need not be waited for: it has an outcome, or is out of time."""
        assert self._outcome is not None
        return self._outcome.poll() or time.monotonic() - self._started_at > timeout_seconds

    def wait(self, timeout_seconds: float) -> Written:
        """Wait for this rank's writing process and return its result; the process is killed on timeout.

        Args:
            timeout_seconds: seconds since `start` that the process may take.

        Returns:
            What the process wrote, or an error message.
        """
        assert self._outcome is not None
        left = max(0.0, timeout_seconds - (time.monotonic() - self._started_at))
        error = f"not written within {timeout_seconds:g} s"
        if self._outcome.poll(left):
            try:
                written: Written = self._outcome.recv()
            except (EOFError, OSError):
                # Killed before it could say anything, or in the middle.
                self._process.join()
                error = f"the writing process ended with exit code {self._process.exitcode}"
            else:
                # Not joined: it has done its work, and freeing its memory takes a while.
                self._memory.release(self._process)
                return written
        self._process.kill()
        self._process.join()
        self._memory.release(self._process)
        return Written(error=f"{self._directory}: {error}")

    def write_index(self, shares: list[Written]) -> None:
        """Write the metadata file that locates each tensor; rank 0 calls it.

        Args:
            shares: results of all ranks, none with an error.
        """
        self._writer.finish(self._metadata, [share.results for share in shares])


def _first_cause(error: BaseException) -> BaseException:
    """Torch reports a full disk as a wrong position in its archive; what came first says more."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error
