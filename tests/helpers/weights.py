"""Weights and gradients by public name, at any layout."""

import torch
import torch.distributed as dist

from megatron_dlm.models.weight_mapping import public_shapes, weight_places
from megatron_dlm.platform.fully_sharded import local, own_range
from megatron_dlm.platform.rng import NoiseSource


def random_state(model, vocabulary_size, seed=5, scale=0.05):
    """Every tensor, gates and head included, drawn N(0, scale); norms around one."""
    state = {}
    for name, shape in public_shapes(model, vocabulary_size).items():
        generator = torch.Generator().manual_seed(NoiseSource(seed).integer(name, 0, 2**31))
        value = torch.randn(shape, generator=generator) * scale
        state[name] = value + 1.0 if "norm" in name else value
    return state


@torch.no_grad()
def set_weights(denoiser, parallel, state):
    for place in weight_places(denoiser, parallel):
        start, end = own_range(place.parameter)
        local(place.parameter).view(-1).copy_(place.cut(state[place.name]).reshape(-1)[start:end])


def gather(denoiser, parallel, values):
    """Full tensors by public name on every rank, from `values[parameter]` of this rank's parameters."""
    mine = {}
    for place in weight_places(denoiser, parallel):
        parts = [torch.empty_like(values[place.parameter]) for _ in range(parallel.tensor_size)]
        dist.all_gather(parts, values[place.parameter].contiguous(), group=parallel.tensor_group)
        mine[place.name] = place.join(parts).clone()
    stages = [None] * parallel.pipeline_size
    dist.all_gather_object(stages, mine, group=parallel.pipeline_group)
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def reduced_gradients(session):
    """Gradients after megatron-core has finished them, whole on every data parallel rank.

    Under the distributed optimizer each rank holds the reduced values of its own shard of each bucket only.
    """
    parallel = session.parallel
    if session.config.parallel.fully_sharded:
        values = {p: p.grad.full_tensor() for p in session.denoiser.parameters()}
        return gather(session.denoiser, parallel, values)
    if session.config.parallel.use_distributed_optimizer:
        group = parallel.replica_group
        for buffer in [buffer for chunk in session.chunks for buffer in chunk.buffers]:
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                parts = [torch.empty_like(shard) for _ in range(group.size())]
                dist.all_gather(parts, shard, group=group)
                bucket.grad_data.copy_(torch.cat(parts))
    values = {parameter: parameter.main_grad for parameter in session.denoiser.parameters()}
    return gather(session.denoiser, parallel, values)
