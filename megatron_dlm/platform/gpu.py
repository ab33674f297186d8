"""GPU checks and helpers of a process: availability, capability, memory, with one-line errors."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dlm.interfaces import InputError, TrainingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import Store

VISIBLE = "CUDA_VISIBLE_DEVICES"
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
RECORDED_ALLOCATIONS = 100_000
"""Newest allocations and frees that a memory snapshot holds: those of some steps."""
ACTIVATION_CURES = (
    "lower training.micro_batch_size, set training.recompute full or raise "
    "parallel.tensor_model_parallel_size"
)
"""What makes the activations of a pass smaller."""
STATE_CURES = (
    "raise parallel.tensor_model_parallel_size or parallel.pipeline_model_parallel_size, shard over more "
    "data parallel ranks (parallel.use_distributed_optimizer), or take a smaller model"
)
"""What makes weights, gradients and optimizer state of a rank smaller."""


def why_no_cuda(environ: Mapping[str, str] = os.environ) -> tuple[str, bool]:
    """Why PyTorch says that CUDA is not available.

    Args:
        environ: variables of this process.

    Returns:
        The reason, and whether the machine has GPUs that somebody expects to be used: they are neither
        hidden nor left out by this build of PyTorch.
    """
    import torch

    if environ.get(VISIBLE, "0").strip() in ("", "-1"):
        return f"{VISIBLE} is {environ[VISIBLE]!r}, which hides all GPUs", False
    if torch.version.cuda is None:
        return f"this PyTorch, {torch.__version__}, is built without CUDA", False
    if not gpu_files():
        if is_container(environ):
            return "this container has no NVIDIA GPU; docker run --gpus all, apptainer --nv give some", False
        return "this machine has no NVIDIA GPU", False
    return f"the driver does not work: {_driver_error()}", True


def is_container(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs in a container of Docker, Podman, Apptainer or Enroot.

    Args:
        environ: variables of this process.

    Returns:
        True where one of their marks is there.
    """
    marks = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "ENROOT_ROOTFS")
    return any(Path(mark).exists() for mark in CONTAINER_MARKS) or any(mark in environ for mark in marks)


def gpu_files() -> list[Path]:
    """The files of this machine's NVIDIA GPUs, whoever may use them."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def _driver_error() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split("\n")[0].rstrip(".")
    return "PyTorch finds no device (nvidia-smi may say why)"


def own_cuda(local_rank: int) -> torch.device:
    """The GPU of a process: the only one that it sees, or that of its rank on this node.

    Args:
        local_rank: of the process.

    Returns:
        The device; it may not be there.
    """
    import torch

    return torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)


def start_cuda(device: torch.device) -> None:
    """Make a GPU this process's own.

    Args:
        device: the GPU.

    Raises:
        InputError: the driver refuses it.
    """
    import torch

    try:
        torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except RuntimeError as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise InputError(f"parallel.device: {device} cannot be used: {reason}") from error


def own_gpu(device: torch.device) -> str:
    """Host name and UUID of a GPU; equal in all processes that use the same GPU."""
    import torch

    return f"{socket.gethostname()}, GPU-{torch.cuda.get_device_properties(device).uuid}"


def refuse_shared_gpus(rank: int, world_size: int, gpu: str) -> None:
    """Refuse two ranks on one GPU, for which NCCL gives only an obscure internal error; all ranks call it.

    Args:
        rank: global rank of this process.
        world_size: number of processes of the job.
        gpu: identifier of this rank's GPU from `own_gpu`.

    Raises:
        InputError: two ranks share a GPU; raised on every rank.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    # Through the store: the first collective would be the one that fails.
    store = _get_default_store()
    first = int(store.compare_set(f"gpu/{gpu}", "", str(rank)))
    if first != rank:
        store.set("gpu/shared", f"ranks {first} and {rank} have the same one ({gpu})")
    asked = _all_there(store, "gpu/asked", world_size)
    store.wait([asked])
    shared = store.get("gpu/shared").decode() if store.check(["gpu/shared"]) else ""
    # Rank 0's process may keep the store: it goes on when the others have their answer.
    answered = _all_there(store, "gpu/answered", world_size)
    if rank == 0:
        store.wait([answered])
    if shared:
        raise InputError(
            f"parallel.device: {shared}, and NCCL needs a GPU for each rank: start as many processes on a "
            "node as it has GPUs"
        )


def _all_there(store: Store, place: str, world_size: int) -> str:
    """Say that this rank has come to a place; the key that is there once all have."""
    key = f"{place}/all"
    if store.add(place, 1) == world_size:
        store.set(key, "")
    return key


waits: list[str] = []
"""Reasons of the `waiting_for_gpu` contexts that this process is currently in."""


@contextmanager
def waiting_for_gpu(what: str) -> Iterator[None]:
    """Mark a place where the CPU waits for the GPU on purpose; a step has few of them.

    Args:
        what: the CPU wants to know.

    Yields:
        Nothing.
    """
    waits.append(what)
    try:
        yield
    finally:
        waits.pop()


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without synchronizing with the GPU.

    Args:
        values: tensor on the CPU.
        device: target device.

    Returns:
        The tensor on `device`; for a GPU, copied asynchronously from pinned memory.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Memory of this process: on a GPU the most that tensors have had so far, on a CPU all it has now.

    Args:
        device: device of this process.

    Returns:
        Bytes.
    """
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability of a GPU, such as (9, 0) for an H100."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


def name_of(device: torch.device) -> str:
    """A GPU's name with its compute capability."""
    import torch

    major, minor = capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


_snapshot: Path | None = None
"""Where a snapshot of the memory goes when it is full; None: none is recorded."""


def record_memory(path: Path) -> None:
    """Record allocations from here on, and write them when GPU memory is full.

    Args:
        path: file of the snapshot, which https://pytorch.org/memory_viz draws.
    """
    import torch

    global _snapshot
    torch.cuda.memory._record_memory_history(max_entries=RECORDED_ALLOCATIONS)
    _snapshot = path


def _write_snapshot() -> str:
    """Write what was recorded, if anything; returns what the error says of it."""
    import torch

    if _snapshot is None:
        return ""
    try:
        _snapshot.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(_snapshot))
    except (OSError, RuntimeError) as error:
        return f"; no memory snapshot: {error}"
    return f"; memory snapshot for pytorch.org/memory_viz: {_snapshot}"


@contextmanager
def allocating(what: str, cures: str) -> Iterator[None]:
    """Turn an out-of-memory error of the GPU into one that says what did not fit and what to change.

    Args:
        what: what is being allocated within the context, for the message.
        cures: settings that reduce its memory, for the message.

    Yields:
        Nothing.

    Raises:
        TrainingError: GPU memory is full; with nested contexts the innermost one raises.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        # "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total capacity of ... is free. ..."
        sizes = " ".join(
            str(error).split("Including")[0].split("Process ")[0].split("Of the alloc")[0].split()
        )
        raise TrainingError(
            f"GPU memory: {what}: {sizes.rstrip('. ')}; {cures}{_write_snapshot()}"
        ) from error
