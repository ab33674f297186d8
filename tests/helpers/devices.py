"""Where tests/gpu run, and processes with a GPU each, or two on one."""

import multiprocessing
import os
import pickle
import time
import traceback
from dataclasses import replace

import torch

from megatron_dlm.platform.launch import ProcessEnvironment
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers.distributed import _collect, free_port

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
GPUS = torch.cuda.device_count() if HAS_CUDA else 0


def run_on_devices(body, world_size, *arguments, parallel=None, timeout=100):
    """`body(state, *arguments)` on ranks that have a GPU each, or share one, or have none, over NCCL or gloo.

    Args:
        body: module-level function.
        world_size: processes.
        arguments: picklable.
        parallel: sizes of the axes.
        timeout: seconds until a hang fails the test.

    Returns:
        What each rank returned, in rank order.
    """
    parallel = replace(parallel or ParallelConfig(), device=DEVICE)
    context, port, children = multiprocessing.get_context("spawn"), free_port(), []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        environment = ProcessEnvironment(
            launcher="test" if world_size > 1 else "single",
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            local_world_size=world_size,
            master_addr="127.0.0.1",
            master_port=port,
        )
        shares = 0 < GPUS < world_size
        process = context.Process(
            target=_child, args=(sender, body, environment, parallel, arguments, shares)
        )
        process.start()
        sender.close()
        children.append((process, receiver))
    try:
        return _collect(children, time.monotonic() + timeout)
    finally:
        for process, _ in children:
            process.kill()
            process.join()


def _child(sender, body, environment, parallel, arguments, shares):
    # Sums of products in the order of a CPU's, as far as a GPU has one.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    from megatron_dlm.platform import parallel as platform

    if shares:
        _share_one_gpu(platform)
    torch.set_num_threads(1)
    try:
        state = platform.start_parallel(environment, parallel)
        sender.send_bytes(pickle.dumps((True, body(state, *arguments))))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise


def _share_one_gpu(platform):
    """NCCL refuses two ranks on one GPU, and so does a run; here gloo carries what it can."""
    usual = platform.start_process_group

    def over_gloo(environment, *, backend, timeout_seconds):
        usual(environment, backend="gloo", timeout_seconds=timeout_seconds)

    platform.start_process_group = over_gloo
    platform.refuse_shared_gpus = lambda *unused: None
