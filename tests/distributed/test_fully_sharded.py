"""Parameters sharded over data parallel ranks: equal losses and gradients, checkpoints, refusals."""

from dataclasses import replace

import pytest
import torch

from megatron_dlm.interfaces import InputError
from megatron_dlm.objectives.esolm import EsoLMConfig
from megatron_dlm.objectives.mdlm import MDLMConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.training.run_checks import check_run
from tests.distributed.test_checkpoint import build, config_for, load_and_go_on, save_at_two
from tests.distributed.test_layouts import all_families, assert_equal_runs, configs_for
from tests.helpers import tiny
from tests.helpers.distributed import run_distributed


def fully_sharded(**changes):
    return ParallelConfig(use_distributed_optimizer=False, fully_sharded=True, **changes)


def families(corpus, parallel, micro_batch_size, recompute="selective"):
    configs = configs_for(corpus, parallel, micro_batch_size, recompute=recompute)
    return {name: config for name, config in configs.items() if not config.objective.has_parts}


@pytest.fixture(scope="module")
def one_process(corpus):
    return run_distributed(all_families, 1, families(corpus, ParallelConfig(), 8))[0]


LAYOUTS = [
    pytest.param(2, 4, {}, "selective", id="data-2"),
    # 4 microbatches on each rank.
    pytest.param(2, 1, {}, "full", id="data-2-accumulated-recomputed"),
    pytest.param(2, 4, {"context_parallel_size": 2}, "selective", id="context-2"),
    pytest.param(
        2, 4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "selective", id="sequence-2"
    ),
    pytest.param(
        4,
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "selective",
        id="sequence-2-data-2",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("world_size", "micro_batch_size", "axes", "recompute"), LAYOUTS)
def test_fully_sharded_equals_one_process(
    corpus, one_process, world_size, micro_batch_size, axes, recompute, record_property
):
    parallel = fully_sharded(**axes)
    configs = families(corpus, parallel, micro_batch_size, recompute)
    for rank, runs in enumerate(run_distributed(all_families, world_size, configs, parallel=parallel)):
        for name, run in runs.items():
            differences = assert_equal_runs(run, one_process[name])
            if rank == 0:
                row = (parallel.tensor_model_parallel_size, 1, world_size, micro_batch_size, "fully sharded")
                record_property("table: layout", (*row, name, *(f"{d:.1e}" for d in differences)))


def sizes(state, config):
    """Elements this rank stores, and those of the whole model."""
    from megatron_dlm.platform.fully_sharded import local

    parameters = list(build(state, config).denoiser.parameters())
    return sum(local(p).numel() for p in parameters), sum(p.numel() for p in parameters)


def test_each_rank_stores_its_part(corpus, tmp_path):
    parallel = fully_sharded()
    stored = run_distributed(sizes, 2, config_for(corpus, tmp_path, parallel), parallel=parallel)
    assert sum(own for own, _ in stored) == stored[0][1]
    assert all(own < 0.51 * whole for own, whole in stored)


def plain(state):
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in state]


def save_sharded(state, config):
    tensors, later = save_at_two(state, config)
    return plain(tensors), later


def load_sharded(state, config):
    tensors, later = load_and_go_on(state, config)
    return plain(tensors), later


def test_fully_sharded_resumes_bit_for_bit(corpus, tmp_path):
    parallel = fully_sharded()
    config = config_for(corpus, tmp_path, parallel)
    saved = run_distributed(save_sharded, 2, config, parallel=parallel)
    resumed = run_distributed(load_sharded, 2, config, parallel=parallel)
    for (state, losses), (loaded, later) in zip(saved, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state, loaded, strict=True))
        assert losses == later


ONE, TWO, THREE = (
    (1, ParallelConfig()),
    (2, fully_sharded()),
    (2, fully_sharded(tensor_model_parallel_size=2)),
)


@pytest.mark.parametrize(("first", "second"), [(ONE, TWO), (TWO, ONE), (TWO, THREE), (THREE, ONE)])
def test_any_layout_loads_what_another_saved(corpus, tmp_path, first, second):
    # Adam divides by the gradient's size: with a small epsilon it blows up its last bits.
    configs = [config_for(corpus, tmp_path, p, optimizer__epsilon=1e-2) for _, p in (first, second)]
    _, expected = run_distributed(save_sharded, first[0], configs[0], parallel=first[1])[0]
    _, later = run_distributed(load_sharded, second[0], configs[1], parallel=second[1])[0]
    for ours, theirs in zip(later, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def take_weights_alone(state, config, directory):
    """Whether weights taken from a checkpoint alone are those of a whole load."""
    from megatron_dlm.checkpointing.manager import load, load_weights
    from megatron_dlm.platform.distributed_optimizer import set_weights
    from megatron_dlm.platform.fully_sharded import local

    whole, alone = build(state, config), build(state, config)
    load(directory, whole.denoiser, whole.optimizer, state)
    weights = load_weights(directory, alone.denoiser, state)
    set_weights(alone.optimizer, {p: weights[name] for name, p in alone.denoiser.named_parameters()})
    pairs = zip(whole.denoiser.parameters(), alone.denoiser.parameters(), strict=True)
    return [torch.equal(local(first), local(second)) for first, second in pairs]


def test_weights_alone_start_a_fully_sharded_run(corpus, tmp_path):
    run_distributed(save_sharded, 1, config_for(corpus, tmp_path, ParallelConfig()))
    config = config_for(corpus, tmp_path, fully_sharded())
    directory = tmp_path / "step-00000002"
    for equal in run_distributed(take_weights_alone, 2, config, directory, parallel=config.parallel):
        assert equal and all(equal)


def test_unsupported_combinations_are_refused(corpus, tmp_path):
    with pytest.raises(InputError, match=r"parallel\.use_distributed_optimizer: True"):
        ParallelConfig(fully_sharded=True)
    with pytest.raises(InputError, match=r"parallel\.pipeline_model_parallel_size: 2"):
        fully_sharded(pipeline_model_parallel_size=2)
    config = replace(tiny.run_config(corpus, tmp_path, MDLMConfig()), parallel=fully_sharded())
    check_run(config, 2)
    with pytest.raises(InputError, match=r"training\.precision: bf16"):
        check_run(replace(config, training=replace(config.training, precision="bf16")), 2)
    with pytest.raises(InputError, match=r"objective\.alpha_0"):
        check_run(replace(config, objective=EsoLMConfig(alpha_0=0.5, batch_split=0.5)), 2)
