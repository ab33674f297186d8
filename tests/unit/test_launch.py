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
