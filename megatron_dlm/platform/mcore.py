"""What must be set inside megatron-core 0.16.1 for our use of it, each with the reason."""

from __future__ import annotations

import queue


def keep_save_results_in_process() -> None:
    """Let a synchronous checkpoint save hand over its results in this process; call before each save.

    megatron-core starts a server process for the results. Launchers send SIGTERM to every process of a
    worker (torchrun to its process group, Slurm to the whole step), the server dies of it, and the save that
    the signal asked for fails with BrokenPipeError. A save that runs in this process needs no server.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()
