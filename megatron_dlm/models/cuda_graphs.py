"""Layers whose kernels are recorded once and replayed: torch's graphed callables for adaLN layers.

Not megatron-core 0.16.1's own graphs, which give the memory of a first layer's input away before its gradient
is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.transformer import cuda_graphs
from torch import Tensor, nn

from megatron_dlm.models.adaln_layer import AdaLNTransformerLayer


class _Computation(nn.Module):
    """Tensors in, a tensor out: what a graph is made of. The layer's parameters are inputs too."""

    def __init__(self, layer: AdaLNTransformerLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.layer.compute(*tensors)


def record_layers(layers: Sequence[AdaLNTransformerLayer], inputs: Sequence[Tensor]) -> None:
    """Record forward and backward passes, which the layers replay from then on wherever they are trained.

    Args:
        layers: of one stage, in order.
        inputs: of the first one's `compute`; all later ones have the same shapes.
    """
    # What a replay reads is copied to these; what has no gradient is the same for all layers.
    constant = [None if tensor.requires_grad else tensor.clone() for tensor in inputs]
    samples = tuple(
        tuple(
            tensor.detach().clone().requires_grad_() if same is None else same
            for tensor, same in zip(inputs, constant, strict=True)
        )
        for _ in layers
    )
    computations = tuple(_Computation(layer) for layer in layers)
    with _hooks_at_rest():
        torch.cuda.make_graphed_callables(computations, samples)
    for layer, computation in zip(layers, computations, strict=True):
        layer.replay = computation.forward


@contextmanager
def _hooks_at_rest() -> Iterator[None]:
    """megatron-core's hooks on modules and gradients do nothing while kernels are recorded."""
    cuda_graphs._set_capture_start()
    try:
        yield
    finally:
        cuda_graphs._set_capture_end()
