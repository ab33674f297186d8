"""The processes of a job together: who is there, do they agree, how fast do they exchange tensors."""

from __future__ import annotations

import socket
import statistics
import time
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dlm.doctor.finding import Finding
from megatron_dlm.doctor.machine import existing_parent
from megatron_dlm.platform.launch import ProcessEnvironment
from megatron_dlm.platform.peers import all_gather_objects
from megatron_dlm.platform.versions import deciding_versions

TOPIC = "job"
LARGEST_SKEW_SECONDS = 1.0
PINGS = 5
REPEATS = 5
MESSAGE_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
NO_DEVICE = "none"
SLOW_PAIR = 0.5
"""A pair of neighbours below this share of the median pair is named."""


def look_at_job(
    environment: ProcessEnvironment, device: torch.device | None, directory: Path, *, quick: bool
) -> list[Finding]:
    """Findings on all processes of a job; all ranks call it, and each gets all findings.

    The default process group is gloo's; tensors of GPUs are exchanged in a group of their own.

    Args:
        environment: the launcher's view of this process.
        device: device of this rank; None: it cannot be used, which this rank's own findings tell.
        directory: directory of the run; it need not exist.
        quick: leave out what takes more than a few seconds.

    Returns:
        Findings, equal on all ranks.
    """
    hosts: list[str] = all_gather_objects(socket.gethostname())
    findings = [_places(environment, hosts), _devices(device, hosts), _versions(hosts)]
    findings += [_clocks(hosts), _storage(directory, hosts)]
    if quick or device is None or findings[1].status == "failed":
        return findings
    group = dist.new_group(backend="nccl") if device.type == "cuda" else dist.group.WORLD
    return [*findings, _all_reduce(device, group), _point_to_point(device, hosts, group)]


def _named(hosts: list[str], ranks: list[int]) -> str:
    """Ranks with their hosts, the first few of them."""
    told = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:4])
    return told + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def _places(environment: ProcessEnvironment, hosts: list[str]) -> Finding:
    counts = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
    value = f"{len(hosts)} on {len(counts)} host(s), started by {environment.launcher}"
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{host} {count}" for host, count in counts.items())
        cure = "tensor parallel groups then cross nodes; give each node as many processes"
        return Finding(TOPIC, "processes", "note", f"{value}, unequally: {told}", cure)
    return Finding(TOPIC, "processes", "ok", value)


def _devices(device: torch.device | None, hosts: list[str]) -> Finding:
    names = all_gather_objects(_name_of(device))
    if NO_DEVICE in names:
        without = [rank for rank, name in enumerate(names) if name == NO_DEVICE]
        value = f"none that can be used on {_named(hosts, without)}"
        return Finding(TOPIC, "devices", "failed", value, "see device of these ranks above")
    if len(set(names)) == 1:
        return Finding(TOPIC, "devices", "ok", f"{len(names)} x {names[0]}")
    odd = [rank for rank, other in enumerate(names) if other != names[0]]
    value = f"rank 0 has {names[0]}, others have {', '.join(sorted(set(names) - {names[0]}))}: "
    return Finding(TOPIC, "devices", "failed", value + _named(hosts, odd), "give the job GPUs of one kind")


def _name_of(device: torch.device | None) -> str:
    if device is None:
        return NO_DEVICE
    return "CPU" if device.type == "cpu" else torch.cuda.get_device_properties(device).name


def _versions(hosts: list[str]) -> Finding:
    everywhere = all_gather_objects(deciding_versions())
    first = everywhere[0]
    for name, wanted in first.items():
        odd = [rank for rank, versions in enumerate(everywhere) if versions[name] != wanted]
        if odd:
            value = f"{name} is {wanted} on rank 0 and {everywhere[odd[0]][name]} on {_named(hosts, odd)}"
            return Finding(TOPIC, "versions", "failed", value, "one environment or image for all nodes")
    return Finding(TOPIC, "versions", "ok", f"equal on all ranks: {', '.join(first)}")


def _clocks(hosts: list[str]) -> Finding:
    """Difference of each rank's clock from rank 0's, from messages there and back."""
    rank, worst, worst_rank = dist.get_rank(), 0.0, 0
    for other in range(1, dist.get_world_size()):
        if rank not in (0, other):
            continue
        skews = []
        for _ in range(PINGS):
            stamp = torch.zeros(1, dtype=torch.float64)
            if rank == 0:
                sent = time.time()
                dist.send(stamp, other)
                dist.recv(stamp, other)
                back = time.time()
                skews.append((back - sent, stamp.item() - (sent + back) / 2))
            else:
                dist.recv(stamp, 0)
                dist.send(torch.full_like(stamp, time.time()), 0)
        if skews and abs(min(skews)[1]) > abs(worst):
            # The quickest exchange tells most.
            worst, worst_rank = min(skews)[1], other
    worst, worst_rank = all_gather_objects((worst, worst_rank))[0]
    value = f"within {abs(worst) * 1e3:.1f} ms of rank 0's"
    if abs(worst) > LARGEST_SKEW_SECONDS:
        value = f"{worst:+.1f} s on {_named(hosts, [worst_rank])}"
        return Finding(
            TOPIC, "clocks", "note", value, "chrony or ntpd; logs of the ranks do not fit together"
        )
    return Finding(TOPIC, "clocks", "ok", value)


def _storage(directory: Path, hosts: list[str]) -> Finding:
    """Whether all ranks see what rank 0 writes where the run's directory is or will be."""
    place = existing_parent(directory)
    mark = place / f".doctor-{all_gather_objects(uuid.uuid4().hex)[0]}"
    error = ""
    if dist.get_rank() == 0:
        try:
            mark.touch()
        except OSError as problem:
            error = str(problem)
    dist.barrier()
    # A network file system may show a new file a little later.
    deadline = time.monotonic() + 5.0
    while not (seen := mark.exists()) and time.monotonic() < deadline and not error:
        time.sleep(0.1)
    all_seen, errors = all_gather_objects(seen), all_gather_objects(error)
    if dist.get_rank() == 0:
        mark.unlink(missing_ok=True)
    if errors[0]:
        return Finding(TOPIC, "storage", "failed", f"rank 0 cannot write: {errors[0]}", "another --directory")
    blind = [rank for rank, has_seen in enumerate(all_seen) if not has_seen]
    if blind:
        value = f"{place} of rank 0 on {hosts[0]} is not seen by {_named(hosts, blind)}"
        return Finding(TOPIC, "storage", "failed", value, "put --directory on storage that all nodes share")
    return Finding(TOPIC, "storage", "ok", f"all ranks see {place}")


def _all_reduce(device: torch.device, group: Any) -> Finding:
    """Bus bandwidth by the slowest rank's median time."""
    size, count = MESSAGE_BYTES[device.type], dist.get_world_size()
    values = torch.ones(size // 4, device=device)
    took = []
    for _ in range(REPEATS + 1):
        values.fill_(1.0)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    seconds = max(all_gather_objects(statistics.median(took[1:])))
    # What each rank's link carries, as nccl-tests counts.
    speed = 2 * (count - 1) / count * size / seconds / 1e9
    return Finding(TOPIC, "all-reduce", "ok", f"{speed:,.2f} GB/s bus bandwidth at {size >> 20} MiB")


def _point_to_point(device: torch.device, hosts: list[str], group: Any) -> Finding:
    """Speed of each rank's send to the next one, even ranks first; the slowest pair is named."""
    rank, count, size = dist.get_rank(), dist.get_world_size(), MESSAGE_BYTES[device.type]
    values = torch.ones(size // 4, device=device)
    mine: dict[int, float] = {}
    for parity in range(2):
        sender = rank if rank % 2 == parity else rank - 1
        has_partner = sender >= 0 and sender + 1 < count
        took = []
        for _ in range(REPEATS + 1):
            dist.barrier()
            start = time.perf_counter()
            if has_partner and sender == rank:
                dist.send(values, rank + 1, group=group)
            elif has_partner:
                dist.recv(values, sender, group=group)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took.append(time.perf_counter() - start)
        if has_partner and sender != rank:
            mine[sender] = size / statistics.median(took[1:]) / 1e9
    speeds = {pair: speed for found in all_gather_objects(mine) for pair, speed in found.items()}
    slowest, median = min(speeds, key=lambda pair: speeds[pair]), statistics.median(speeds.values())
    value = f"median {median:,.2f} GB/s, slowest {speeds[slowest]:,.2f} from rank {slowest} to {slowest + 1}"
    if speeds[slowest] < SLOW_PAIR * median:
        value += f" ({hosts[slowest]} to {hosts[slowest + 1]})"
        return Finding(TOPIC, "point to point", "note", value, "look at this pair's links and cards")
    return Finding(TOPIC, "point to point", "ok", value)
