"""Steps that do not end, replicas that have come apart."""

import time
from dataclasses import replace

import pytest
import torch

from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.interfaces import TrainingError
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers import faulty
from tests.helpers.distributed import run_distributed
from tests.helpers.sessions import build
from tools import tiny


def sleep_in_a_step():
    from megatron_dlm.data.loading.blending import SampleReader

    read, calls = SampleReader.read, []

    def sleeping_read(*arguments):
        calls.append(1)
        if len(calls) == 20:
            time.sleep(60)
        return read(*arguments)

    SampleReader.read = sleeping_read


def test_a_step_that_does_not_end_shows_where_it_is(corpus, tmp_path):
    config = tiny.run_config(corpus, tmp_path, MDLMConfig(), training__num_steps=50)
    config = replace(config, training=replace(config.training, step_timeout_seconds=2.0))
    began = time.monotonic()
    code, output = faulty.train_in_child(config, sleep_in_a_step)
    assert time.monotonic() - began < 30
    assert code == 1 and "in sleeping_read" in output, output


def with_a_flipped_bit(state, config, faulty_rank):
    """What each rank is told after a step, where one rank's memory has changed."""
    from megatron_dlm.training.hooks.replicas import ReplicaHook
    from megatron_dlm.training.loop import train_step
    from megatron_dlm.training.progress import TrainingProgress

    session, progress = build(state, config), TrainingProgress()
    report, hook = train_step(session, progress), ReplicaHook()
    hook.after_step(session, progress, report)
    if state.rank == faulty_rank:
        parameter = dict(session.denoiser.named_parameters())["final_layer.norm.weight"]
        parameter.data.view(torch.int32)[3] ^= 1 << 5
    try:
        hook.after_step(session, progress, report)
    except TrainingError as error:
        return str(error)
    return ""


def differences_of_gathered_weights(state, config):
    """What a comparison says in the middle of a run that gathers weights in its forward passes."""
    from megatron_dlm.training.hooks.replicas import ReplicaHook
    from megatron_dlm.training.loop import train_step
    from megatron_dlm.training.progress import TrainingProgress

    session, progress, hook = build(state, config), TrainingProgress(), ReplicaHook()
    for _ in range(3):
        hook.after_step(session, progress, train_step(session, progress))
    return progress.step


def test_weights_that_wait_to_be_gathered_are_not_taken_for_damage(corpus, tmp_path):
    config = tiny.run_config(corpus, tmp_path, MDLMConfig(), training__check_replicas_every=1)
    parallel = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=2000)
    config = replace(config, parallel=parallel)
    assert run_distributed(differences_of_gathered_weights, 2, config, parallel=parallel) == [3, 3]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_flipped_bit_is_found_and_named(corpus, tmp_path, precision):
    config = tiny.run_config(
        corpus,
        tmp_path,
        MDLMConfig(),
        training__precision=precision,
        training__global_batch_size=9,
        training__micro_batch_size=3,
        training__check_replicas_every=1,
    )
    for message in run_distributed(with_a_flipped_bit, 3, config, 1, parallel=config.parallel):
        assert "differ between replicas: rank 1, final_layer.norm.weight;" in message


def test_every_stage_stops_for_one(corpus, tmp_path):
    config = tiny.run_config(corpus, tmp_path, MDLMConfig(), training__check_replicas_every=1)
    config = replace(config, parallel=ParallelConfig(pipeline_model_parallel_size=2))
    found = run_distributed(with_a_flipped_bit, 4, config, 3, parallel=config.parallel)
    assert all("step 1: weights differ between replicas" in message for message in found)
    assert sum("of another stage" in message for message in found) == 2
