"""Moving averages of the weights: what the formula says, at every layout, saved, loaded and resharded."""

from dataclasses import replace

import pytest
import torch

from megatron_dlm.checkpointing.full_weights import FullWeights
from megatron_dlm.checkpointing.layout import CheckpointRoot
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.run.optimizer_config import OptimizerConfig
from tests.helpers.distributed import run_distributed
from tests.helpers.selection import slow
from tests.helpers.sessions import LAYOUTS, build, build_random, config_for, steps

DECAY = 0.3
"""Above (1 + n) / (10 + n) until step 2, below it later."""
VOCABULARY = 301
SHARDED = {"fully sharded": (2, ParallelConfig(fully_sharded=True, use_distributed_optimizer=False))}


def averaging(corpus, directory, parallel, **changes):
    config = config_for(corpus, directory, parallel, **changes)
    return replace(config, optimizer=OptimizerConfig(ema_decay=DECAY))


def train_and_save(state, config, first, last):
    """Steps `first` to `last`, each saved; from the newest checkpoint if there is one."""
    from megatron_dlm.checkpointing.manager import load
    from tests.helpers.runs import save

    complete = CheckpointRoot(config.directory).complete()
    session = build(state, config) if complete else build_random(state, config)
    if complete:
        load(complete[-1], session.denoiser, session.optimizer, state, averaged=True)
    for step in range(first, last + 1):
        steps(session, step - 1, 1)
        save(session, step)


def weights_of(config, step, *, averaged):
    directory = CheckpointRoot(config.directory).final(step)
    weights = FullWeights(directory, config.model, VOCABULARY, averaged=averaged)
    return weights.read(weights.shapes)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("one", "fp32"),
        ("plain", "bf16"),
        ("tp2pp2", "fp32"),
        ("overlapping", "bf16"),
        ("fully sharded", "bf16"),
    ],
)
def test_averages_follow_the_weights(corpus, tmp_path, name, precision):
    world_size, parallel = (LAYOUTS | SHARDED)[name]
    config = averaging(corpus, tmp_path, parallel, training__precision=precision)
    run_distributed(train_and_save, world_size, config, 1, 4, parallel=parallel)
    expected = weights_of(config, 1, averaged=False)
    for step in range(1, 5):
        share = 1 - min(DECAY, (1 + step) / (10 + step))
        for key, weight in weights_of(config, step, averaged=False).items():
            expected[key] = torch.lerp(expected[key], weight, share)
        found = weights_of(config, step, averaged=True)
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=1e-6, atol=1e-7), (step, key)
    assert any(
        not torch.equal(found[key], weight) for key, weight in weights_of(config, 4, averaged=False).items()
    )


@pytest.mark.parametrize(
    ("source", "target"), [("one", "one"), slow("pp2dp2", "tp2pp2"), slow("tp2", "plain")]
)
def test_averages_go_on_after_a_restart(corpus, tmp_path, source, target):
    whole = averaging(corpus, tmp_path / "whole", LAYOUTS[source][1])
    run_distributed(train_and_save, LAYOUTS[source][0], whole, 1, 4, parallel=whole.parallel)
    first = replace(whole, directory=tmp_path / "parts")
    run_distributed(train_and_save, LAYOUTS[source][0], first, 1, 2, parallel=first.parallel)
    second = replace(first, parallel=LAYOUTS[target][1])
    run_distributed(train_and_save, LAYOUTS[target][0], second, 3, 4, parallel=second.parallel)
    expected, found = (weights_of(config, 4, averaged=True) for config in (whole, second))
    for key, value in expected.items():
        if source == target:
            assert torch.equal(found[key], value), key
        else:
            assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-6), key


def test_a_run_may_begin_to_average_and_cease_to(corpus, tmp_path):
    """Averages begin as the weights of the first step that they see; a run without them goes on without."""
    config = averaging(corpus, tmp_path, ParallelConfig())
    plain = replace(config, optimizer=OptimizerConfig())
    run_distributed(train_and_save, 1, plain, 1, 1)
    with pytest.raises(InputError, match="the run has no averages of its weights"):
        weights_of(plain, 1, averaged=True)
    run_distributed(train_and_save, 1, config, 2, 2)
    begun, weights = weights_of(config, 2, averaged=True), weights_of(config, 2, averaged=False)
    assert all(torch.equal(begun[key], weights[key]) for key in weights)
