"""One host: processors, memory, GPUs and their links, files."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from megatron_dlm.doctor.finding import Finding
from megatron_dlm.platform.gpu import why_no_cuda

TOPIC = "machine"
GIB = 2**30
LEAST_SHARED_MEMORY_GIB = 1
LEAST_OPEN_FILES = 4096
WRITTEN_BYTES = 256 * 2**20
BUSY_GPU_GIB = 1.0
"""Memory of a GPU in use before a run starts, above which somebody else is on it."""
SLOW_DISK_MB_S = 100


def look_at_machine(directory: Path, *, quick: bool) -> list[Finding]:
    """Findings on this host.

    Args:
        directory: directory of the run, or where files would be written; it need not exist.
        quick: leave out what takes more than a second.

    Returns:
        Findings.
    """
    findings = [_processors(), _memory(), *_gpus(), _shared_memory(), _open_files(), *_disk(directory)]
    return findings if quick else [*findings, *_links(), _write_speed(directory)]


def _processors() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding(
        TOPIC, "processors", "ok", f"{usable} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding(
        TOPIC, "memory", "ok", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    )


def _gpus() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        reason, is_unexpected = why_no_cuda()
        cure = "--parallel.device cpu does without" if is_unexpected else ""
        return [Finding(TOPIC, "GPUs", "failed" if is_unexpected else "ok", f"none: {reason}", cure)]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        used = (total - free) / GIB
        value = (
            f"{properties.name}, {total / GIB:.1f} GiB, {used:.1f} in use, compute capability "
            f"{properties.major}.{properties.minor}"
        )
        if used > BUSY_GPU_GIB:
            cure = "nvidia-smi names the processes on it"
            findings.append(Finding(TOPIC, f"GPU {index}", "note", value, cure))
        else:
            findings.append(Finding(TOPIC, f"GPU {index}", "ok", value))
    return findings


def _links() -> list[Finding]:
    """Links between this host's GPUs, and their network cards, as the driver tells."""
    if shutil.which("nvidia-smi") is None:
        return []
    told = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True)
    if told.returncode:
        return [Finding(TOPIC, "links", "note", told.stderr.strip() or "nvidia-smi topo -m failed")]
    rows = [line.split() for line in told.stdout.splitlines() if line.startswith("GPU")]
    kinds = sorted({cell for row in rows for cell in row[1 : len(rows) + 1] if cell != "X"})
    return [Finding(TOPIC, "links", "ok", f"{len(rows)} GPUs, linked by {', '.join(kinds) or 'nothing'}")]


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding(TOPIC, "/dev/shm", "note", "not there", "data.workers share batches through it")
    size = shutil.disk_usage(path).free / GIB
    if size >= LEAST_SHARED_MEMORY_GIB:
        return Finding(TOPIC, "/dev/shm", "ok", f"{size:.1f} GiB free")
    cure = "docker run --ipc host or --shm-size 8g; data.workers and NCCL share memory through it"
    return Finding(TOPIC, "/dev/shm", "note", f"{size:.2f} GiB free", cure)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= LEAST_OPEN_FILES:
        return Finding(TOPIC, "open files", "ok", f"{soft:,}, which a run raises to {hard:,}")
    return Finding(TOPIC, "open files", "note", f"at most {hard:,}", f"ulimit -Hn {LEAST_OPEN_FILES} or more")


def existing_parent(directory: Path) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    directory = directory.absolute()
    while not directory.is_dir():
        directory = directory.parent
    return directory


def _disk(directory: Path) -> list[Finding]:
    place = existing_parent(directory)
    if not os.access(place, os.W_OK):
        cure = "another --directory, or write permission"
        return [Finding(TOPIC, "disk", "failed", f"{place} cannot be written to", cure)]
    usage = shutil.disk_usage(place)
    return [
        Finding(
            TOPIC, "disk", "ok", f"{usage.free / GIB:,.1f} of {usage.total / GIB:,.1f} GiB free at {place}"
        )
    ]


def _write_speed(directory: Path) -> Finding:
    block = os.urandom(2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=existing_parent(directory)) as file:
            start = time.perf_counter()
            for _ in range(WRITTEN_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN_BYTES / (time.perf_counter() - start) / 1e6
    except OSError as error:
        return Finding(TOPIC, "disk speed", "failed", f"cannot write: {error}", "another --directory")
    if speed < SLOW_DISK_MB_S:
        cure = "checkpoints take long; checkpoint.async-save hides most of it"
        return Finding(TOPIC, "disk speed", "note", f"{speed:,.0f} MB/s written and flushed", cure)
    return Finding(TOPIC, "disk speed", "ok", f"{speed:,.0f} MB/s written and flushed")
