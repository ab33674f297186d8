"""Layers whose kernels are recorded once and replayed: torch's graphed callables for adaLN layers.

Not megatron-core 0.16.1's own graphs, which give the memory of a first layer's input away before its gradient
is made.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_dlm.models.adaln_layer import AdaLNTransformerLayer
from megatron_dlm.platform.megatron import hooks_at_rest


class _Computation(nn.Module):
    """Tensors in, a tensor out: what a graph is made of. The layer's parameters are inputs too."""

    def __init__(self, layer: AdaLNTransformerLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.layer.compute(*tensors)


def record_layers(
    layers: Sequence[AdaLNTransformerLayer], inputs: Sequence[Tensor], constants: Sequence[Tensor]
) -> None:
    """Record forward and backward passes, which the layers replay from then on wherever they are trained.

    Args:
        layers: of one stage, in order.
        inputs: with gradients, of the first one's `compute`; all later ones have the same shapes.
        constants: what `compute` takes behind them, the same for all layers. A replay reads this very memory.
    """
    samples = tuple(
        (*(tensor.detach().clone().requires_grad_() for tensor in inputs), *constants) for _ in layers
    )
    computations = tuple(_Computation(layer) for layer in layers)
    with hooks_at_rest():
        torch.cuda.make_graphed_callables(computations, samples)
    for layer, computation in zip(layers, computations, strict=True):
        layer.replay = computation.forward


def forget_layers(layers: Sequence[AdaLNTransformerLayer]) -> None:
    """Give recordings up; a communicator does not end while a recording holds its kernels.

    Args:
        layers: that compute from then on.
    """
    for layer in layers:
        layer.replay = None
    # They are parts of circles.
    gc.collect()


@contextmanager
def where_recordings_may_join() -> Iterator[None]:
    """A stream of its own, for megatron-core's data parallel wrapper around layers that are to be recorded.

    The wrapper keeps the nodes that sum parameters' gradients, which stay on the stream it was made on.
    A recording waits on it, which ends with cudaErrorStreamCaptureImplicit where it is the default stream
    (pytorch/pytorch#180090); Megatron-LM's own training makes its wrapper so.

    Yields:
        Nothing.
    """
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
    usual, own = torch.cuda.current_stream(), torch.cuda.Stream()
    own.wait_stream(usual)
    with torch.cuda.stream(own):
        yield
    usual.wait_stream(own)
