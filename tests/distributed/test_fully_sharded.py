"""Parameters sharded over data parallel ranks: equal losses and gradients, checkpoints, refusals."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.validation import check_run
from tests.helpers import weights
from tests.helpers.distributed import run_distributed
from tests.helpers.layouts import all_families, assert_equal_runs, configs_for
from tests.helpers.selection import slow
from tests.helpers.sessions import (
    build,
    build_random,
    config_for,
    load_and_go_on,
    optimizer_state,
    save_at_two,
    start_from_weights,
    steps,
)
from tools import tiny


def fully_sharded(**changes):
    return ParallelConfig(use_distributed_optimizer=False, fully_sharded=True, **changes)


def families(corpus, parallel, micro_batch_size, recompute="selective"):
    configs = configs_for(corpus, parallel, micro_batch_size, recompute=recompute)
    return {name: config for name, config in configs.items() if not config.objective.has_parts}


@pytest.fixture(scope="module")
def one_process(corpus):
    return run_distributed(all_families, 1, families(corpus, ParallelConfig(), 8))[0]


SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = [
    pytest.param(2, 4, {}, "selective", id="data-2"),
    # 4 microbatches on each rank.
    slow(2, 1, {}, "full", id="data-2-accumulated-recomputed"),
    slow(2, 4, {"context_parallel_size": 2}, "selective", id="context-2"),
    slow(2, 4, SEQUENCE, "selective", id="sequence-2"),
    slow(4, 2, SEQUENCE, "selective", id="sequence-2-data-2"),
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
                place = (parallel, world_size, micro_batch_size, "fully sharded")
                record_property("table: layout", row(*place, name, differences))


def row(parallel, world_size, micro_batch_size, options, name, differences):
    """Of the table of layouts."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    options = f"context {context}, {options}" if context > 1 else options
    data = parallel.data_parallel_size(world_size)
    return (tensor, 1, data, micro_batch_size, options, name, *(f"{d:.1e}" for d in differences))


def bf16_families(corpus, parallel, micro_batch_size, recompute="selective"):
    configs = families(corpus, parallel, micro_batch_size, recompute)
    names = ("mdlm", "ar", "duo-curriculum")
    return {name: bf16(config) for name, config in configs.items() if name in names}


def bf16(config):
    return replace(config, training=replace(config.training, precision="bf16"))


@pytest.fixture(scope="module")
def one_bf16_process(corpus):
    return run_distributed(all_families, 1, bf16_families(corpus, ParallelConfig(), 8))[0]


BF16_LAYOUTS = [
    pytest.param(1, 8, {}, "selective", id="one"),
    slow(2, 2, {}, "selective", id="data-2-accumulated"),
    slow(2, 1, {}, "full", id="data-2-recomputed"),
    slow(4, 2, {}, "selective", id="data-4"),
    slow(2, 4, {"context_parallel_size": 2}, "selective", id="context-2"),
    slow(2, 4, SEQUENCE, "selective", id="sequence-2"),
    slow(4, 2, SEQUENCE, "selective", id="sequence-2-data-2"),
]


@pytest.mark.parametrize(("world_size", "micro_batch_size", "axes", "recompute"), BF16_LAYOUTS)
def test_fully_sharded_bf16_equals_the_distributed_optimizer(
    corpus, one_bf16_process, world_size, micro_batch_size, axes, recompute, record_property
):
    """As float32 does at one layout: both gather the same bf16 weights and sum gradients in float32.

    To one process the distance is bf16's, whose 8 bits round each microbatch's gradients by 0.4%: what other
    microbatches, or parts of tensors, sum to differs by that for each product on the way.
    """
    sharded, distributed = fully_sharded(**axes), ParallelConfig(**axes)
    configs, others = (
        bf16_families(corpus, parallel, micro_batch_size, recompute) for parallel in (sharded, distributed)
    )
    runs = run_distributed(all_families, world_size, configs, parallel=sharded)
    expected = run_distributed(all_families, world_size, others, parallel=distributed)[0]
    for name in configs:
        for run in runs:
            assert_equal_runs(run[name], expected[name])
        differences = assert_equal_runs(
            runs[0][name], one_bf16_process[name], loss=1e-4, gradient=5e-2, norm=1e-2
        )
        place = (sharded, world_size, micro_batch_size, "fully sharded, bf16")
        record_property("table: layout", row(*place, name, differences))


def sizes(state, config):
    """Elements this rank stores, and those of the whole model."""
    from megatron_dlm.platform.fully_sharded import local

    parameters = list(build(state, config).denoiser.parameters())
    return sum(local(p).numel() for p in parameters), sum(p.numel() for p in parameters)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_rank_stores_its_part(corpus, tmp_path, precision):
    parallel = fully_sharded()
    config = config_for(corpus, tmp_path, parallel, training__precision=precision)
    stored = run_distributed(sizes, 2, config, parallel=parallel)
    assert sum(own for own, _ in stored) == stored[0][1]
    assert all(own < 0.51 * whole for own, whole in stored)


def first_weights(state, config):
    """Whole weights by public name, as a session begins with them."""
    session = build(state, config)
    whole = {p: getattr(p, "full_tensor", lambda p=p: p)().detach() for p in session.denoiser.parameters()}
    return weights.gather(session.denoiser, state, whole)


def test_bf16_begins_with_what_fp32_begins_with(corpus, tmp_path):
    """Not with weights that were bf16 once."""
    config = config_for(corpus, tmp_path, fully_sharded())
    (expected,) = run_distributed(first_weights, 1, replace(config, parallel=ParallelConfig()))
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in expected.values())
    for found in run_distributed(first_weights, 2, bf16(config), parallel=config.parallel):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def step_with_a_damaged_gradient(state, config):
    """Gradient norms of a damaged step and of the next; whether the damaged one left the weights alone."""
    from megatron_dlm.platform.fully_sharded import local
    from megatron_dlm.training.optimizer import step_if_finite

    session = build_random(state, config)
    steps(session, 0, 1)
    before = plain(optimizer_state(session))
    session.run_batch(1, 8)
    if state.rank == state.world_size - 1:
        local(session.denoiser.head.weight.grad).view(-1)[0] = float("nan")
    norm = step_if_finite(session.optimizer, session.parallel.device)
    kept = all(torch.equal(a, b) for a, b in zip(before, plain(optimizer_state(session)), strict=True))
    return norm, kept, steps(session, 2, 1)[0][2]


def test_a_gradient_of_one_rank_that_is_not_finite_changes_nothing(corpus, tmp_path):
    config = bf16(config_for(corpus, tmp_path, fully_sharded()))
    for norm, kept, later in run_distributed(
        step_with_a_damaged_gradient, 2, config, parallel=config.parallel
    ):
        assert math.isnan(norm) and kept and 0 < later < 100


def plain(state):
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in state]


def save_sharded(state, config):
    tensors, later = save_at_two(state, config)
    return plain(tensors), later


def load_sharded(state, config):
    tensors, later = load_and_go_on(state, config)
    return plain(tensors), later


@pytest.mark.parametrize("precision", ["bf16", slow("fp32")])
def test_fully_sharded_resumes_bit_for_bit(corpus, tmp_path, precision):
    parallel = fully_sharded()
    config = config_for(corpus, tmp_path, parallel, training__precision=precision)
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


@pytest.mark.parametrize(
    ("first", "second"), [slow(ONE, TWO), slow(TWO, ONE), slow(TWO, THREE), (THREE, ONE)]
)
def test_any_layout_loads_what_another_saved(corpus, tmp_path, first, second):
    # Adam divides by the gradient's size: with a small epsilon it blows up its last bits.
    configs = [config_for(corpus, tmp_path, p, optimizer__epsilon=1e-2) for _, p in (first, second)]
    _, expected = run_distributed(save_sharded, first[0], configs[0], parallel=first[1])[0]
    _, later = run_distributed(load_sharded, second[0], configs[1], parallel=second[1])[0]
    for ours, theirs in zip(later, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def whole_state(state, session):
    """Main weights and moments, by name and public name; of optimizers that ranks share."""
    from megatron_dlm.platform.distributed_optimizer import MOMENTS, main_pieces, state_of
    from megatron_dlm.platform.fully_sharded import local

    parameters = list(session.denoiser.parameters())
    found = {name: {p: torch.zeros(p.shape) for p in parameters} for name in ("main", *MOMENTS)}
    for part, parameter, main, start, end in main_pieces(session.optimizer, set(parameters)):
        moments = state_of(part, main)
        for name, tensors in found.items():
            piece = main if name == "main" else moments[name]
            tensors[parameter].view(-1)[start:end] = local(piece.detach()).reshape(-1)
    for tensors in found.values():
        for tensor in tensors.values():
            torch.distributed.all_reduce(tensor, group=state.replica_group)
    return {name: weights.gather(session.denoiser, state, tensors) for name, tensors in found.items()}


def save_whole_state(state, config):
    """Saves after two steps; the whole state then, and three more steps."""
    from tests.helpers.runs import save

    session = build_random(state, config)
    steps(session, 0, 2)
    save(session, 2)
    return whole_state(state, session), steps(session, 2, 3)


def load_whole_state(state, config):
    """The whole state after loading, model weights against it, and three more steps."""
    from megatron_dlm.checkpointing.manager import load, verify_on_all_ranks

    session = build(state, config)
    directory = config.directory / "step-00000002"
    verify_on_all_ranks(directory, state)
    load(directory, session.denoiser, session.optimizer, state)
    return whole_state(state, session), steps(session, 2, 3)


PAIR = (2, ParallelConfig())
BF16_PAIRS = [
    slow(PAIR, TWO, id="to-fully-sharded"),
    pytest.param(TWO, PAIR, id="from-fully-sharded"),
    slow(ONE, TWO, id="one-to-fully-sharded"),
    slow(TWO, ONE, id="fully-sharded-to-one"),
    slow(TWO, THREE, id="other-fully-sharded"),
    slow(THREE, PAIR, id="other-to-distributed"),
]


@pytest.mark.parametrize(("first", "second"), BF16_PAIRS)
def test_any_bf16_layout_loads_exactly_what_another_saved(corpus, tmp_path, first, second):
    """fp32 main weights and moments to the last bit, and losses as close as the layouts' arithmetic is."""
    configs = [bf16(config_for(corpus, tmp_path, p, optimizer__epsilon=1e-2)) for _, p in (first, second)]
    saved, expected = run_distributed(save_whole_state, first[0], configs[0], parallel=first[1])[0]
    for loaded, later in run_distributed(load_whole_state, second[0], configs[1], parallel=second[1]):
        for name, tensors in saved.items():
            assert all(torch.equal(loaded[name][key], tensor) for key, tensor in tensors.items()), name
        tolerance = 1e-5 if {first, second} == {PAIR, TWO} else 1e-2
        for ours, theirs in zip(later, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance)


def test_weights_of_a_fully_sharded_bf16_run_are_read_exactly(corpus, tmp_path):
    """By exports, in one process without groups, and by runs that begin with another's weights."""
    from megatron_dlm.checkpointing.full_weights import FullWeights
    from megatron_dlm.run.datasets import open_data

    config = bf16(config_for(corpus, tmp_path, fully_sharded()))
    saved, _ = run_distributed(save_whole_state, 2, config, parallel=config.parallel)[0]
    directory = tmp_path / "step-00000002"
    vocabulary_size = open_data(config.data).vocabulary.size
    read = FullWeights(directory, config.model, vocabulary_size).read(saved["main"])
    second = replace(config, parallel=ParallelConfig())
    (taken,) = run_distributed(start_from_weights, 1, second, directory)
    for found in (read, taken):
        assert found.keys() == saved["main"].keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in saved["main"].items())


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


@pytest.mark.parametrize("precision", [slow("fp32"), "bf16"])
def test_weights_alone_start_a_fully_sharded_run(corpus, tmp_path, precision):
    config = config_for(corpus, tmp_path, fully_sharded(), training__precision=precision)
    run_distributed(save_sharded, 1, replace(config, parallel=ParallelConfig()))
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
    check_run(bf16(config), 2)
    with pytest.raises(InputError, match=r"training\.precision: fp8, and parallel\.fully_sharded"):
        check_run(replace(config, training=replace(config.training, precision="fp8")), 2)
    with pytest.raises(InputError, match=r"objective\.alpha_0"):
        check_run(replace(config, objective=EsoLMConfig(alpha_0=0.5, batch_split=0.5)), 2)
