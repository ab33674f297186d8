"""`megatron-dlm doctor [RECIPE]`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dlm.cli.recipe import recipe_run, take_number
from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    from megatron_dlm.doctor.finding import Finding
    from megatron_dlm.run.config import RunConfig

USAGE = """usage: megatron-dlm doctor [RECIPE] [--quick] [--json] [--processes N] [--field.name VALUE ...]

Looks at the software, this machine and, if RECIPE is given, at what its run needs: configuration, data,
tokenizer, what it starts from, memory and disk. Started by torchrun, srun or mpirun it looks at the whole
job: processes, devices, versions and clocks of all ranks, shared storage, bandwidth of all-reduce and of each
pair of neighbours; rank 0 prints.

--quick       leave out what takes more than a few seconds: disk speed, links and bandwidths
--json        print a list of findings as JSON
--processes   number of processes of the job that the recipe is meant for; default those started now
Each finding is ok, a note (works, with less than could be had) or failed.
exit code: 0 if nothing has failed, 1 otherwise
"""
MARKS = {"ok": "ok", "note": "note", "failed": "FAILED"}


def run(arguments: list[str]) -> int:
    """Parse, look, print; returns the exit code."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    words = [word for word in arguments if word not in ("--quick", "--json")]
    words, processes = take_number(words, "--processes", "processes")
    config = recipe_run(words, verb="doctor", usage=USAGE) if words else None
    findings, rank = _look(config, processes, quick="--quick" in arguments)
    from megatron_dlm.doctor.finding import can_run

    if rank == 0:
        _print(findings, as_json="--json" in arguments)
    return 0 if can_run(findings) else 1


def _look(config: RunConfig | None, processes: int | None, *, quick: bool) -> tuple[list[Finding], int]:
    """All findings, those of other hosts that are not ok included, and this process's rank."""
    from megatron_dlm.doctor.finding import Finding
    from megatron_dlm.doctor.machine import look_at_machine
    from megatron_dlm.doctor.software import look_at_software
    from megatron_dlm.platform.launch import detect_environment
    from megatron_dlm.platform.parallel import prepare_device
    from megatron_dlm.platform.parallel_config import ParallelConfig

    environment = detect_environment()
    layout = ParallelConfig() if config is None else config.parallel
    directory = Path.cwd() if config is None else config.directory
    findings = look_at_software()
    findings += look_at_machine(directory, quick=quick or environment.local_rank > 0)
    device = None
    try:
        device = prepare_device(environment, layout)
    except InputError as error:
        findings.append(Finding("machine", "device", "failed", str(error)))
    if config is not None and device is not None:
        from megatron_dlm.doctor.recipe import look_at_recipe

        world, local = environment.world_size, environment.local_world_size
        findings += look_at_recipe(config, processes or world, min(local, processes or local), device)
    if environment.world_size == 1:
        return findings, 0
    return _look_together(environment, layout, device, directory, findings, quick=quick), environment.rank


def _look_together(
    environment: Any, layout: Any, device: Any, directory: Path, own: list[Finding], *, quick: bool
) -> list[Finding]:
    """Rank 0's findings, what is not ok on other hosts, and those of the job."""
    import socket

    import torch.distributed as dist

    from megatron_dlm.doctor.job import look_at_job
    from megatron_dlm.platform.peers import all_gather_objects
    from megatron_dlm.platform.rendezvous import start_process_group

    # Not NCCL, which processes without a GPU cannot start: the others would wait for them.
    start_process_group(environment, backend="gloo", timeout_seconds=layout.collective_timeout_seconds)
    together = look_at_job(environment, device, directory, quick=quick)
    everywhere = all_gather_objects((socket.gethostname(), own))
    dist.barrier()
    dist.destroy_process_group()
    known = {(finding.topic, finding.name, finding.status) for finding in everywhere[0][1]}
    others = []
    for rank, (host, findings) in enumerate(everywhere):
        for finding in findings:
            place = (finding.topic, finding.name, finding.status)
            if finding.status != "ok" and place not in known:
                known.add(place)
                named = f"{finding.name} (rank {rank}, {host})"
                others.append(dataclasses.replace(finding, name=named))
    return [*everywhere[0][1], *others, *together]


def _print(findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
        return
    width = max(len(finding.name) for finding in findings)
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            print(topic)
        print(f"  {MARKS[finding.status]:<6} {finding.name:<{width}}  {finding.value}")
        if finding.cure and finding.status != "ok":
            print(f"  {'':<6} {'':<{width}}  -> {finding.cure}")
    counts = {status: sum(finding.status == status for finding in findings) for status in MARKS}
    print(f"{counts['ok']} ok, {counts['note']} notes, {counts['failed']} failed")
    sys.stdout.flush()
