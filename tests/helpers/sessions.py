"""Sessions that tests build, train, save and load."""

from dataclasses import replace

import torch

from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers import weights
from tests.helpers.layouts import toy_model
from tools import tiny

LAYOUTS = {
    "one": (1, ParallelConfig()),
    "plain": (1, ParallelConfig(use_distributed_optimizer=False)),
    "tp2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "pp2dp2": (4, ParallelConfig(pipeline_model_parallel_size=2)),
    "tp2sp": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp3": (3, ParallelConfig(pipeline_model_parallel_size=3)),
    "pp2vpp2": (
        2,
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "cp2": (2, ParallelConfig(context_parallel_size=2)),
    # Weights are whole only in the middle of the next forward pass.
    "overlapping": (
        2,
        ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=2000),
    ),
    "padded": (1, ParallelConfig(pad_vocabulary_to=128)),
    "tp2padded": (2, ParallelConfig(tensor_model_parallel_size=2, pad_vocabulary_to=64)),
    "tp2pp2": (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}


def config_for(corpus, directory, parallel, objective=None, **changes):
    config = tiny.run_config(corpus, directory, objective or MDLMConfig(), **changes)
    # 40 x 5 heads and a hidden size that is no multiple of 64 leave padding in every bucket.
    return replace(config, model=toy_model(num_layers=4), parallel=parallel)


def build(state, config):
    from megatron_dlm.run.datasets import open_data
    from megatron_dlm.training.session import Session

    return Session(config, open_data(config.data), state)


def build_random(state, config):
    """A session whose every tensor, gates and head included, is random."""
    session = build(state, config)
    weights.set_weights(
        session.denoiser, state, weights.random_state(config.model, session.data.vocabulary.size)
    )
    session.optimizer.reload_model_params()
    return session


def steps(session, first, count):
    """Losses and gradient norms of `count` steps from step `first`."""
    from megatron_dlm.training.loop import train_step
    from megatron_dlm.training.progress import TrainingProgress

    progress = TrainingProgress(
        step=first, consumed_samples=first * session.config.training.global_batch_size
    )
    reports = [train_step(session, progress) for _ in range(count)]
    return [(report.loss, report.nats_per_token, report.grad_norm) for report in reports]


def optimizer_state(session):
    """Every tensor of the inner optimizers on this rank, in order."""
    tensors = []
    for part in getattr(session.optimizer, "chained_optimizers", [session.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                tensors += [
                    parameter.detach().clone(),
                    *(state[k].clone() for k in ("exp_avg", "exp_avg_sq", "step")),
                ]
    return tensors


def save_at_two(state, config, more=3):
    from tests.helpers.runs import save

    session = build_random(state, config)
    steps(session, 0, 2)
    save(session, 2)
    return optimizer_state(session), steps(session, 2, more)


def load_and_go_on(state, config, more=3):
    from megatron_dlm.checkpointing.layout import CheckpointRoot
    from megatron_dlm.checkpointing.manager import load, verify_on_all_ranks

    session = build(state, config)
    (directory,) = CheckpointRoot(config.directory).complete()
    verify_on_all_ranks(directory, state)
    load(directory, session.denoiser, session.optimizer, state)
    loaded = optimizer_state(session)
    return loaded, steps(session, 2, more)


def start_from_weights(state, config, directory):
    """The full main weights of a run that took the weights alone from a checkpoint."""
    from megatron_dlm.checkpointing.manager import load_weights
    from megatron_dlm.platform.distributed_optimizer import set_weights

    session = build(state, config)
    loaded = load_weights(directory, session.denoiser, state)
    set_weights(session.optimizer, {p: loaded[name] for name, p in session.denoiser.named_parameters()})
    read = {}
    for parameter in session.denoiser.parameters():
        whole, own = torch.zeros(parameter.shape), slice(None)
        sharded = config.parallel.use_distributed_optimizer
        if sharded and parameter.main_param is not None:
            place = session.optimizer.chained_optimizers[0]._get_model_param_range_map(parameter)["param"]
            own = slice(place.start, place.end)
        if parameter.main_param is not None:
            whole.view(-1)[own] = parameter.main_param.detach().view(-1)
        if sharded:
            torch.distributed.all_reduce(whole, group=state.replica_group)
        assert torch.equal(parameter, whole.bfloat16())
        read[parameter] = whole
    return weights.gather(session.denoiser, state, read)
