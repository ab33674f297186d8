"""Which processes work where sizes do not divide by all."""

import dataclasses

import pytest

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.launch import ProcessEnvironment
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.working_ranks import find_working_ranks
from tools import tiny


def config_of(tmp_path, **parallel):
    """A run of 8 samples a step in microbatches of 1."""
    config = tiny.run_config(tiny.Corpus.at(tmp_path), tmp_path / "run", OBJECTIVES["mdlm"]())
    sizes = {"global_batch_size": 8, "micro_batch_size": 1}
    evaluation = dataclasses.replace(config.evaluation, batch_size=8)
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, **sizes),
        evaluation=evaluation,
        parallel=ParallelConfig(**parallel),
    )


@pytest.mark.parametrize(
    ("processes", "tensor", "count"),
    [(8, 1, 8), (7, 1, 4), (3, 1, 2), (5, 2, 4), (16, 1, 8), (7, 2, 4), (15, 2, 8)],
)
def test_the_largest_number_that_divides_works(tmp_path, processes, tensor, count):
    config = config_of(tmp_path, tensor_model_parallel_size=tensor, idle_ranks=True)
    working = find_working_ranks(config, processes)
    assert (working.count, working.idle) == (count, processes - count)
    if working.idle:
        assert f"{count} of {processes} processes work and rank" in working.describe()
        assert "global_batch_size" in working.describe() or "world size" in working.describe()


def test_without_the_option_and_without_any_number_it_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a multiple of"):
        find_working_ranks(config_of(tmp_path), 3)
    with pytest.raises(InputError, match="does not divide the world size 3"):
        find_working_ranks(config_of(tmp_path, tensor_model_parallel_size=4, idle_ranks=True), 3)


@pytest.mark.parametrize(("rank", "here"), [(0, 2), (1, 2), (2, 1)])
def test_a_rank_s_place_among_those_that_work(tmp_path, rank, here):
    """3 of 4 on two nodes of 2."""
    working = dataclasses.replace(find_working_ranks(config_of(tmp_path), 4), count=3)
    environment = ProcessEnvironment(
        launcher="torchrun",
        rank=rank,
        world_size=4,
        local_rank=rank % 2,
        local_world_size=2,
        master_addr="node0",
        master_port=29500,
    )
    place = working.place(environment)
    assert (place.rank, place.world_size, place.local_world_size) == (rank, 3, here)
