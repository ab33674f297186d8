"""Where tests/gpu run, and processes with a GPU each, or two on one."""

import multiprocessing
import os
import pickle
import time
import traceback
from dataclasses import replace

import torch

from tests.helpers.distributed import _collect, place_of
from tests.helpers.hang import HANG_SECONDS
from tools.ports import free_port

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
GPUS = torch.cuda.device_count() if HAS_CUDA else 0


def run_on_devices(body, world_size, layouts, timeout=HANG_SECONDS):
    """Bodies on ranks that have a GPU each, or share one, or have none, over NCCL or gloo.

    The same processes run all layouts one after the other, so that imports are paid for once.

    Args:
        body: module-level function of a rank's state and its arguments.
        world_size: processes.
        layouts: by name, sizes of the axes and arguments, picklable.
        timeout: seconds for all until a hang fails the test.

    Returns:
        By name, what each rank returned, in rank order, tensors on the CPU; or the text of a failure, behind
        which no layout is tried.
    """
    context, children = multiprocessing.get_context("spawn"), []
    work = [
        (name, free_port(), replace(parallel, device=DEVICE), pickle.dumps((body, arguments)))
        for name, (parallel, arguments) in layouts.items()
    ]
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sender, rank, world_size, work))
        process.start()
        sender.close()
        children.append((process, receiver))
    try:
        ranks = _collect(children, time.monotonic() + timeout)
    finally:
        for process, _ in children:
            process.kill()
            process.join()
    found = {}
    for name in layouts:
        answers = [rank.get(name, (False, "not tried after a failure")) for rank in ranks]
        failures = [value for ok, value in answers if not ok]
        found[name] = failures[0] if failures else [value for _, value in answers]
    return found


def _child(sender, rank, world_size, work):
    # Sums of products in the order of a CPU's, as far as a GPU has one.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    from torch.utils._pytree import tree_map

    from megatron_dlm.platform import parallel as platform

    if 0 < GPUS < world_size:
        _share_one_gpu(platform)
    found = {}
    for name, port, parallel, pickled in work:
        environment = place_of(rank, world_size, port, "test" if world_size > 1 else "single")
        try:
            state = platform.start_parallel(environment, replace(parallel, intra_op_threads=1))
            # Looked at when the device is there: what a test imports must not come before.
            body, arguments = pickle.loads(pickled)
            value = body(state, *arguments)
            found[name] = True, tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, value)
            platform.stop_parallel()
        except Exception:
            found[name] = False, traceback.format_exc()
            break
    sender.send_bytes(pickle.dumps((True, found)))


def _share_one_gpu(platform):
    """NCCL refuses two ranks on one GPU, and so does a run; here gloo carries what it can."""
    usual = platform.start_process_group

    def over_gloo(environment, *, backend, timeout_seconds):
        usual(environment, backend="gloo", timeout_seconds=timeout_seconds)

    platform.start_process_group = over_gloo
    platform.refuse_shared_gpus = lambda *unused: None
