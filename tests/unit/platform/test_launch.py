import pytest

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel_config import ParallelConfig

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_JOB_ID": "41234567",
    "MASTER_ADDR": "node1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_torchrun():
    found = detect_environment(TORCHRUN)
    assert (found.launcher, found.rank, found.world_size, found.local_rank) == ("torchrun", 5, 16, 1)
    assert (found.master_addr, found.master_port) == ("h", 1)


def test_slurm_takes_a_port_of_its_own_and_keeps_a_preset_address():
    found = detect_environment(SLURM)
    assert (found.launcher, found.rank, found.world_size, found.local_rank) == ("slurm", 9, 16, 1)
    assert (found.local_world_size, found.master_addr, found.master_port) == (8, "node1", 24567)


def test_a_shell_inside_an_allocation_is_no_job_step():
    assert detect_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}).launcher == "single"


def test_open_mpi_on_one_node_meets_on_loopback():
    found = detect_environment(OPEN_MPI)
    assert (found.launcher, found.rank, found.master_addr) == ("mpi", 1, "127.0.0.1")


def test_open_mpi_inside_slurm_is_open_mpi():
    """Its daemons are started by srun, whose variables their children inherit."""
    assert detect_environment(SLURM | OPEN_MPI).launcher == "mpi"


def test_slurm_without_scontrol_or_address(monkeypatch):
    monkeypatch.setenv("PATH", "")
    environment = {name: value for name, value in SLURM.items() if name != "MASTER_ADDR"}
    with pytest.raises(InputError, match="MASTER_ADDR: not set, and scontrol"):
        detect_environment(environment)


def test_mpich():
    found = detect_environment(
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    )
    assert (found.launcher, found.rank, found.world_size, found.local_rank) == ("mpi", 1, 2, 1)


def step(task, tasks, per_node):
    """What srun sets for one of its tasks, on nodes of `per_node` tasks each."""
    return {
        **{"SLURM_STEP_ID": "0", "SLURM_PROCID": str(task), "SLURM_STEP_NUM_TASKS": str(tasks)},
        **{"SLURM_LOCALID": str(task % per_node), "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x2)"},
        **{"SLURM_JOB_ID": "4", "MASTER_ADDR": "node1"},
    }


def pmi(rank, size, per_node):
    """What MPICH's and Intel MPI's launcher sets."""
    local = {"MPI_LOCALRANKID": str(rank % per_node), "MPI_LOCALNRANKS": str(per_node)}
    return {"PMI_RANK": str(rank), "PMI_SIZE": str(size)} | local


def open_mpi(rank, size, per_node):
    prefix = "OMPI_COMM_WORLD_"
    values = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank % per_node, "LOCAL_SIZE": per_node}
    return {prefix + name: str(value) for name, value in values.items()}


SHELL = {"SLURM_JOB_ID": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "MASTER_ADDR": "node1"}
INTERACTIVE_STEP = step(0, 1, 1) | {"SLURM_STEP_ID": "4294967290"}
LAUNCHES = {
    # Environments of all processes, and whose ranks they must take.
    "srun": ([step(r, 4, 2) for r in range(4)], "slurm"),
    "srun --mpi=pmi2": ([step(r, 4, 2) | {"PMI_RANK": str(r), "PMI_SIZE": "4"} for r in range(4)], "slurm"),
    "srun --mpi=pmi2 without size": ([step(r, 4, 2) | {"PMI_RANK": str(r)} for r in range(4)], "slurm"),
    "hydra": ([pmi(r, 4, 4) for r in range(4)], "mpi"),
    # Its daemons, one a node, are srun's tasks.
    "hydra in Slurm, 1 node of 4": ([step(0, 1, 1) | pmi(r, 4, 4) for r in range(4)], "mpi"),
    "hydra in Slurm, 2 nodes of 1": ([step(r, 2, 1) | pmi(r, 2, 1) for r in range(2)], "slurm"),
    "hydra in Slurm, 2 nodes of 2": ([step(r // 2, 2, 1) | pmi(r, 4, 2) for r in range(4)], "mpi"),
    "hydra in an interactive step": ([INTERACTIVE_STEP | pmi(r, 4, 4) for r in range(4)], "mpi"),
    "Open MPI in Slurm, 2 nodes of 2": ([step(r // 2, 2, 1) | open_mpi(r, 4, 2) for r in range(4)], "mpi"),
    "salloc's shell": ([SHELL], "single"),
    "salloc's interactive step": ([INTERACTIVE_STEP], "slurm"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_no_two_processes_of_a_launch_take_one_rank(name):
    processes, launcher = LAUNCHES[name]
    found = [detect_environment(environ) for environ in processes]
    assert [process.rank for process in found] == list(range(len(processes)))
    assert {process.world_size for process in found} == {len(processes)}
    assert {process.launcher for process in found} == {launcher}
    per_node = found[0].local_world_size
    assert [process.local_rank for process in found] == [rank % per_node for rank in range(len(processes))]


def test_mpi_over_nodes_needs_an_address():
    with pytest.raises(InputError, match="MASTER_ADDR: not set"):
        detect_environment(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "x"}, "RANK: 'x' in the environment is not a number"),
        ({"RANK": "16"}, "RANK: 16 is outside"),
    ],
)
def test_bad_environment_is_named(change, message):
    with pytest.raises(InputError, match=message):
        detect_environment(TORCHRUN | change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_model_parallel_size": 0}, "parallel.tensor_model_parallel_size: 0 is below 1"),
        ({"collective_timeout_seconds": 0.0}, "parallel.collective_timeout_seconds: 0.0 is not above 0"),
    ],
)
def test_parallel_config_refuses(fields, message):
    with pytest.raises(InputError, match=message):
        ParallelConfig(**fields)


def test_world_must_hold_whole_replicas():
    config = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert config.data_parallel_size(8) == 2
    with pytest.raises(InputError, match="does not divide the world size 6"):
        config.data_parallel_size(6)
