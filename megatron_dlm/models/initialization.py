"""Initial weights, drawn from (seed, public name) on the full tensor: no layout changes a weight."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from megatron_dlm.models.denoiser import ChunkedDenoiser, Denoiser
from megatron_dlm.models.weight_mapping import public_shapes, weight_places
from megatron_dlm.platform.fp8_weights import set_first_value
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.platform.rng import NoiseSource


@torch.no_grad()
def initialize(denoiser: Denoiser | ChunkedDenoiser, parallel: ParallelState, seed: int) -> None:
    """Give every parameter its initial value (arXiv:2602.15014: PyTorch defaults, zero gates and head).

    Args:
        denoiser: this process's stage; changed in place.
        parallel: this process's place.
        seed: of the run.
    """
    noise = NoiseSource(seed, "weights")
    shapes = public_shapes(denoiser.model, denoiser.vocabulary.size)
    for place in weight_places(denoiser, parallel):
        # A bias follows its weight's fan-in.
        fan_in = shapes.get(place.name.removesuffix(".bias") + ".weight", place.shape)[-1]
        full = initial_tensor(place.name, place.shape, fan_in, noise)
        set_first_value(place.parameter, place.cut(full))


def initial_tensor(name: str, shape: tuple[int, ...], fan_in: int, noise: NoiseSource) -> Tensor:
    """Initial value of one full tensor.

    Args:
        name: public name.
        shape: full shape.
        fan_in: inputs of the layer the tensor belongs to.
        noise: weights' source.

    Returns:
        float32 of `shape`: ones for norms; zeros for modulations and head, so every block starts as the
        identity and the first loss is ln(V - 1); else uniform in +-1/sqrt(fan_in).
    """
    if "norm" in name:
        return torch.ones(shape)
    if "adaLN_modulation" in name or name.startswith("output_layer.linear"):
        return torch.zeros(shape)
    values = noise.uniform(name, [0], math.prod(shape))[0]
    bound = 1.0 / math.sqrt(fan_in)
    return torch.from_numpy(((2.0 * values - 1.0) * bound).astype(np.float32)).view(shape)
