"""Which processes of a job work, where its sizes do not divide by all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.launch import ProcessEnvironment
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.validation import check_run, is_legal


@dataclass(frozen=True)
class WorkingRanks:
    """The first processes of a job, which work; the others wait."""

    count: int
    started: int
    """Processes of the job."""
    reason: str = ""
    """Why not all work."""

    @property
    def idle(self) -> int:
        """Number of processes that wait."""
        return self.started - self.count

    def describe(self) -> str:
        """One line for the log of a job with processes that wait."""
        idle = f"rank {self.count} waits" if self.idle == 1 else f"ranks {self.count}-{self.started - 1} wait"
        return f"{self.count} of {self.started} processes work and {idle}: {self.reason}"

    def place(self, environment: ProcessEnvironment) -> ProcessEnvironment:
        """Place of a process that works among those that work.

        Args:
            environment: its place in the job; rank below `count`.

        Returns:
            The same rank, with the numbers of processes that work in all and on its node.
        """
        first_here = environment.rank - environment.local_rank
        here = min(environment.local_world_size, self.count - first_here)
        return replace(environment, world_size=self.count, local_world_size=here)


def find_working_ranks(config: RunConfig, processes: int) -> WorkingRanks:
    """All processes, or with `parallel.idle_ranks` the largest number that the run's sizes divide by.

    Args:
        config: configuration of the run.
        processes: processes of the job.

    Returns:
        Processes that work.

    Raises:
        InputError: no number of processes can run this, or all are asked for and cannot.
    """
    try:
        check_run(config, processes)
    except InputError as error:
        if config.parallel.idle_ranks:
            for count in range(processes - 1, 0, -1):
                if is_legal(config, count):
                    return WorkingRanks(count, processes, str(error))
        raise
    return WorkingRanks(processes, processes)
