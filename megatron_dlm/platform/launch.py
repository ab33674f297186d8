"""How this process was started: torchrun, Slurm's srun, an MPI launcher, or alone.

Reads environment variables only.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dlm.interfaces import InputError

DEFAULT_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class ProcessEnvironment:
    """Rank of this process and where its peers meet."""

    launcher: str
    """torchrun, slurm, mpi or single."""
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    """Host name or address of rank 0."""
    master_port: int
    is_on_one_node: bool = True
    """Whether all processes that the launcher has started are on this node."""


def detect_environment(environ: Mapping[str, str] = os.environ) -> ProcessEnvironment:
    """The launcher's view of this process.

    Order: torchrun (RANK), Open MPI (OMPI_COMM_WORLD_RANK), MPICH and Intel MPI (PMI_RANK), srun
    (SLURM_STEP_ID: a bare shell in an allocation does not count), else one process. Processes of an MPI
    launcher inside Slurm also carry the variables of the srun that started its daemons, one a node;
    srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE itself, to Slurm's own numbers. A preset MASTER_ADDR or
    MASTER_PORT always wins, since node names do not resolve on every cluster.

    Args:
        environ: environment variables.

    Returns:
        Rank, sizes and meeting point.

    Raises:
        InputError: an MPI job over several nodes without MASTER_ADDR; a variable that is not a number.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _build(environ, "torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if "OMPI_COMM_WORLD_RANK" in environ:
        prefix = "OMPI_COMM_WORLD_"
        names = (f"{prefix}RANK", f"{prefix}SIZE", f"{prefix}LOCAL_RANK", f"{prefix}LOCAL_SIZE")
        return _build(environ, "mpi", names)
    if "PMI_RANK" in environ and _is_of_mpich(environ):
        return _build(environ, "mpi", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"))
    if _is_of_srun(environ):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        return _build(environ, "slurm", names)
    return ProcessEnvironment(
        launcher="single",
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        is_on_one_node=True,
        master_addr="127.0.0.1",
        master_port=_number(environ, "MASTER_PORT", 0),
    )


def _is_of_srun(environ: Mapping[str, str]) -> bool:
    return "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ


def _is_of_mpich(environ: Mapping[str, str]) -> bool:
    """Whether PMI_RANK is of MPICH's launcher, not of an srun that speaks its protocol."""
    if not _is_of_srun(environ):
        return True
    by_slurm = {"PMI_RANK": "SLURM_PROCID", "PMI_SIZE": "SLURM_STEP_NUM_TASKS"}
    return "PMI_SIZE" in environ and any(environ[pmi] != environ.get(own) for pmi, own in by_slurm.items())


def _build(environ: Mapping[str, str], launcher: str, names: tuple[str, str, str, str]) -> ProcessEnvironment:
    rank, world_size = _number(environ, names[0]), _number(environ, names[1])
    local_world_size = _number(environ, names[3], 1)
    if not 0 <= rank < world_size:
        raise InputError(f"{names[0]}: {rank} is outside [0, {names[1]}={world_size})")
    return ProcessEnvironment(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=_number(environ, names[2], 0),
        local_world_size=local_world_size,
        is_on_one_node=local_world_size == world_size,
        master_addr=_master_addr(environ, launcher, local_world_size == world_size),
        master_port=_master_port(environ),
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    # Slurm writes repeated task counts as "8(x16)".
    text = environ.get(name, "").split("(")[0].split(",")[0]
    if not text and default is not None:
        return default
    if not text.isdigit():
        raise InputError(f"{name}: {environ.get(name)!r} in the environment is not a number")
    return int(text)


def _master_addr(environ: Mapping[str, str], launcher: str, one_node: bool) -> str:
    if preset := environ.get("MASTER_ADDR"):
        return preset
    if one_node:
        return "127.0.0.1"
    if launcher == "slurm":
        return _first_slurm_node(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "")))
    raise InputError("MASTER_ADDR: not set; a job over several nodes needs the address of rank 0")


def _first_slurm_node(node_list: str) -> str:
    command = ["scontrol", "show", "hostnames", node_list]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise InputError(f"MASTER_ADDR: not set, and {' '.join(command)} did not tell the nodes") from error


def _master_port(environ: Mapping[str, str]) -> int:
    if "MASTER_PORT" not in environ and "SLURM_JOB_ID" in environ:
        # Two jobs on one node must not meet.
        return 20000 + _number(environ, "SLURM_JOB_ID") % 10000
    return _number(environ, "MASTER_PORT", DEFAULT_PORT)
