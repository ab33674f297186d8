"""Run a function on real gloo processes and bring back what each rank returns.

The pytest process itself never starts a process group.
"""

import pickle
import time
import traceback
from dataclasses import replace

import pytest

from megatron_dlm.platform.launch import ProcessEnvironment
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.processes import context
from tools.ports import free_port


def run_distributed(body, world_size, *arguments, parallel=None, timeout=HANG_SECONDS):
    """`body(state, *arguments)` on every rank.

    Args:
        body: module-level function.
        world_size: processes.
        arguments: picklable.
        parallel: sizes of the axes.
        timeout: seconds until a hang fails the test.

    Returns:
        What each rank returned, in rank order.
    """
    parallel = replace(parallel or ParallelConfig(), device="cpu")
    port = free_port()
    children = []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        environment = place_of(rank, world_size, port)
        process = context.Process(target=_child, args=(sender, body, environment, parallel, arguments))
        process.start()
        sender.close()
        children.append((process, receiver))
    try:
        return _collect(children, time.monotonic() + timeout)
    finally:
        for process, _ in children:
            process.kill()
            process.join()


def place_of(rank, world_size, port, launcher="test"):
    """A rank of processes on this machine that meet at a port."""
    return ProcessEnvironment(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        master_addr="127.0.0.1",
        master_port=port,
    )


def _collect(children, deadline):
    results, failures = [], []
    for rank, (_, receiver) in enumerate(children):
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            failures.append(f"rank {rank}: no answer in time")
            continue
        try:
            ok, value = pickle.loads(receiver.recv_bytes())
        except EOFError:
            ok, value = False, "died without an answer"
        (results if ok else failures).append(value if ok else f"rank {rank}: {value}")
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return results


def _child(sender, body, environment, parallel, arguments):
    from megatron_dlm.platform.parallel import start_parallel

    try:
        state = start_parallel(environment, parallel)
        # Plain pickle: multiprocessing would share tensors through a process that is about to end.
        sender.send_bytes(pickle.dumps((True, body(state, *arguments))))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise
