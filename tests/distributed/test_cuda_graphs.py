"""Layers that are recorded once and replayed train as layers that run."""

from dataclasses import replace

import pytest

from megatron_dlm.objectives.ar import ARConfig
from megatron_dlm.objectives.duo import DuoConfig
from megatron_dlm.objectives.esolm import EsoLMConfig
from megatron_dlm.objectives.mdlm import MDLMConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.distributed.test_checkpoint import build_random, config_for, steps
from tests.helpers.distributed import run_distributed

CASES = {
    "mdlm": (MDLMConfig(loss="elbo", time_conditioning=True), 1, ParallelConfig()),
    "ar": (ARConfig(), 1, ParallelConfig()),
    "duo": (DuoConfig(), 1, ParallelConfig()),
    "esolm": (EsoLMConfig(alpha_0=1.0), 1, ParallelConfig()),
    "tensor parallel": (
        MDLMConfig(),
        2,
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    ),
    "data parallel, overlapping": (
        ARConfig(),
        2,
        ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=2000),
    ),
    "context parallel": (DuoConfig(), 2, ParallelConfig(context_parallel_size=2)),
}


def train(state, config, records):
    """Reports of four steps with evaluations around them, and how often each recording was replayed."""
    from tests.helpers import graph_tape

    if records:
        graph_tape.install()
        config = replace(config, parallel=replace(config.parallel, cuda_graphs=True))
    session = build_random(state, config)
    found = []
    for first in (0, 2):
        found += [session.validation.run(config.evaluation).nats_per_token, *steps(session, first, 2)]
    session.denoiser.forget_recordings()
    assert all(layer.replay is None for layer in session.denoiser.block.layers)
    return found, [tape.replays for tape in graph_tape.tapes]


@pytest.mark.parametrize("name", CASES)
def test_replayed_layers_train_as_layers_that_run(corpus, tmp_path, name):
    """Bit for bit, on torch's graphed callables over a stand-in for CUDA's recordings."""
    objective, size, parallel = CASES[name]
    config = config_for(corpus, tmp_path, parallel, objective, training__recompute="none")
    expected = run_distributed(train, size, config, False, parallel=parallel)
    found = run_distributed(train, size, config, True, parallel=parallel)
    training = config.training
    passes = 4 * training.global_batch_size // training.micro_batch_size // parallel.data_parallel_size(size)
    for (reports, replays), (usual, _) in zip(found, expected, strict=True):
        assert reports == usual
        # Forward and backward of four layers.
        assert replays == [passes] * 8
