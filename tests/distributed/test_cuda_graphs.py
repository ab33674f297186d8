"""Layers that are recorded once and replayed train as layers that run."""

from dataclasses import replace

import pytest
import torch

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers.distributed import run_distributed
from tests.helpers.gradients import accumulated_gradients
from tests.helpers.selection import quick
from tests.helpers.sessions import build_random, config_for, steps

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


@pytest.mark.parametrize("name", quick(CASES, "mdlm", "esolm", "data parallel, overlapping"))
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


def recorded_gradients(state, config):
    from tests.helpers import graph_tape

    graph_tape.install()
    return accumulated_gradients(state, replace(config, parallel=ParallelConfig(cuda_graphs=True)))


@pytest.mark.parametrize("objective", [MDLMConfig(), DuoConfig()], ids=["mdlm", "duo"])
def test_gradients_of_three_microbatches_are_summed(corpus, tmp_path, objective):
    changes = {"training__recompute": "none", "training__global_batch_size": 6}
    config = config_for(corpus, tmp_path, ParallelConfig(), objective, **changes)
    (expected,) = run_distributed(accumulated_gradients, 1, config)
    (found,) = run_distributed(recorded_gradients, 1, config)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def sums_of_plain_gradients(state):
    """Gradients of two passes of a recorded linear: where torch keeps them, and added up at once."""
    from tests.helpers import graph_tape

    graph_tape.install()
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 4)
    weight = linear.weight
    first, second = torch.randn(2, 3, 4)
    expected = sum(torch.autograd.grad(linear(x).square().sum(), weight)[0] for x in (first, second))
    recorded = torch.cuda.make_graphed_callables(linear, (torch.randn(3, 4).requires_grad_(),))
    for x in (first, second):
        recorded(x.clone().requires_grad_()).square().sum().backward()
    kept = weight.grad.clone()
    weight.grad = None
    at_once = torch.zeros_like(weight)
    for x in (first, second):
        recorded(x.clone().requires_grad_()).square().sum().backward()
        at_once += weight.grad
        weight.grad = None
    return kept, at_once, expected


def test_what_torch_keeps_of_a_recording_is_overwritten_and_what_is_added_at_once_is_not():
    """pytorch/pytorch#181723: the first pass's gradient is the recording's own memory."""
    ((kept, at_once, expected),) = run_distributed(sums_of_plain_gradients, 1)
    torch.testing.assert_close(at_once, expected.detach())
    assert not torch.allclose(kept, expected)


def stream_of_the_wrapper(state, config):
    """Whether megatron-core's wrapper is made on the stream that the rest of the program uses."""
    from megatron.core import distributed

    from megatron_dlm.platform import cpu

    places = []

    class Stream(cpu._Stream):
        def __enter__(self):
            places.append("own")
            return self

        def __exit__(self, *error):
            places.append("usual")

    torch.cuda.Stream = Stream
    torch.cuda.stream = lambda stream: stream
    usual = distributed.DistributedDataParallel

    def noted(*arguments, **keywords):
        places.append("wrapper")
        return usual(*arguments, **keywords)

    distributed.DistributedDataParallel = noted
    from tests.helpers.sessions import build

    build(state, config)
    return places


@pytest.mark.parametrize("records", [True, False])
def test_what_sums_gradients_is_made_where_a_recording_may_wait_for_it(corpus, tmp_path, records):
    """On the default stream a recording ends with cudaErrorStreamCaptureImplicit."""
    parallel = ParallelConfig(cuda_graphs=records)
    config = config_for(corpus, tmp_path, parallel, training__recompute="none")
    (places,) = run_distributed(stream_of_the_wrapper, 1, config)
    where = places.index("wrapper")
    assert places[where - 1 : where + 2] == (["own", "wrapper", "usual"] if records else ["wrapper"])
