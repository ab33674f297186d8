"""What a job on one machine lets others reach, and what a rank that hangs tells."""

import os
import time

import psutil
import pytest

from megatron_dlm.interfaces import TrainingError
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers.distributed import run_distributed


def listening_addresses(state):
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))
    return sorted({c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN})


def test_one_machine_s_job_listens_on_the_loopback_address_only():
    assert run_distributed(listening_addresses, 2) == [["127.0.0.1"], ["127.0.0.1"]]


def wait_for_a_sleeper(state, directory):
    import torch
    import torch.distributed as dist

    from megatron_dlm.platform.failure_report import naming_the_rank_at_fault

    os.dup2(os.open(directory / f"stderr-{state.rank}", os.O_WRONLY | os.O_CREAT), 2)
    try:
        with naming_the_rank_at_fault(state.rank, state.world_size):
            if state.rank == 1:
                oversleep()
            dist.all_reduce(torch.ones(1))
    except TrainingError as error:
        return str(error)


def oversleep():
    time.sleep(9)


def test_a_rank_that_hangs_is_named_and_every_rank_shows_its_stack(tmp_path):
    parallel = ParallelConfig(collective_timeout_seconds=2)
    first, _ = run_distributed(wait_for_a_sleeper, 2, tmp_path, parallel=parallel)
    assert first == "rank 1 is gone or hangs: no answer within 5 s"
    assert "in wait_for_a_sleeper\n    dist.all_reduce" in (tmp_path / "stderr-0").read_text()
    told = (tmp_path / "stderr-1").read_text()
    assert "another rank waited in vain" in told and "in oversleep" in told


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_port_in_use_is_named(name):
    import socket

    from megatron_dlm.interfaces import InputError
    from megatron_dlm.platform.launch import ProcessEnvironment
    from megatron_dlm.platform.rendezvous import start_process_group

    with socket.create_server((name, 0)) as taken:
        port = taken.getsockname()[1]
        environment = ProcessEnvironment(
            launcher="test",
            rank=0,
            world_size=2,
            local_rank=0,
            local_world_size=2,
            master_addr=name,
            master_port=port,
        )
        with pytest.raises(InputError, match=f"MASTER_PORT: {port} on {name} is in use"):
            start_process_group(environment, backend="gloo", timeout_seconds=5)
