"""A loss or gradient that is not finite ends the run, naming step, rank and samples."""

from dataclasses import replace

import pytest
import torch

from megatron_dlm.interfaces import TrainingError
from megatron_dlm.objectives.ar import ARConfig
from megatron_dlm.platform.parallel import ParallelConfig
from tests.helpers import tiny
from tests.helpers.distributed import run_distributed


def train_with(state, config, spoil):
    """What `train_step` complains of in the second step, after `spoil` has changed the weights."""
    from megatron_dlm.training.run_data import open_data
    from megatron_dlm.training.session import Session
    from megatron_dlm.training.trainer import Progress, train_step

    session = Session(config, open_data(config.data), state)
    progress = Progress()
    train_step(session, progress)
    expected = spoil(session)
    before = [parameter.detach().clone() for parameter in session.denoiser.parameters()]
    try:
        train_step(session, progress)
    except TrainingError as error:
        pairs = zip(before, session.denoiser.parameters(), strict=True)
        unchanged = all(torch.equal(a.nan_to_num(), b.detach().nan_to_num()) for a, b in pairs)
        return str(error), expected, unchanged
    return "no complaint", expected, False


def spoil_one_token(session):
    """Make the embedding of a token NaN that one sample of the second batch alone holds; its position."""
    from megatron_dlm.data.loader import SampleOrder
    from megatron_dlm.platform.rng import NoiseSource

    size = session.config.training.global_batch_size
    blocks = session.data.train
    order = SampleOrder(blocks.num_blocks, NoiseSource(session.config.training.seed))
    positions = torch.arange(size, 2 * size).numpy()
    rows = [set(row[:-1].tolist()) for row in blocks.read(order(positions))]
    for place, ids in enumerate(rows):
        others = set().union(*(row for index, row in enumerate(rows) if index != place))
        if ids - others:
            with torch.no_grad():
                session.denoiser.embedding.weight[min(ids - others)] = float("nan")
            return int(positions[place])
    raise AssertionError("no token belongs to one sample alone")


def test_the_sample_at_fault_is_named(corpus):
    config = tiny.run_config(corpus, corpus.directory / "unused", ARConfig(), training__micro_batch_size=1)
    complaints = run_distributed(train_with, 2, config, spoil_one_token)
    sample = complaints[0][1]
    for rank, (message, _, unchanged) in enumerate(complaints):
        assert unchanged
        share = range(8 + 4 * rank, 12 + 4 * rank)
        where = f"samples [{sample}]" if sample in share else "nothing seen here, samples of another rank"
        assert message == f"loss: not finite in step 2 on rank {rank}: {where}"


def spoil_the_gradient(session):
    """A finite loss whose gradient overflows."""
    if not session.parallel.is_last_stage:
        return
    with torch.no_grad():
        session.denoiser.final_layer.norm.weight.fill_(1e38)
        session.denoiser.head.weight.fill_(0.0)
        session.denoiser.head.weight[:2, :1] = 1e-30


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_gradient_norm_that_is_not_finite_stops_the_run(corpus, pipeline):
    parallel = ParallelConfig(pipeline_model_parallel_size=pipeline)
    config = tiny.run_config(corpus, corpus.directory / "unused", ARConfig())
    config = replace(config, parallel=parallel)
    for rank, (message, _, _) in enumerate(
        run_distributed(train_with, pipeline, config, spoil_the_gradient, parallel=parallel)
    ):
        assert (
            message.startswith("gradient norm: ") and f"in step 2 on rank {rank}, samples from 8" in message
        )
