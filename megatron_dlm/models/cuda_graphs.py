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
    """Record the layers' forward and backward passes as CUDA graphs, which training replays from then on.

    Args:
        layers: layers of one pipeline stage, in order.
        inputs: inputs of the first layer's `compute` that need gradients; later layers have the same shapes.
        constants: remaining inputs of `compute`, shared by all layers. Replays read this very memory.
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
    """Release CUDA graphs: a NCCL communicator cannot be destroyed while a graph holds its kernels.

    Args:
        layers: layers to run without graphs from then on.
    """
    for layer in layers:
        layer.replay = None
    # They are parts of circles.
    gc.collect()


@contextmanager
def where_recordings_may_join() -> Iterator[None]:
    """Use a side CUDA stream while creating megatron-core's DDP wrapper around layers to be recorded.

    The wrapper keeps the AccumulateGrad nodes of the parameters, which stay on the stream it was created on.
    Graph capture waits on that stream, and fails with cudaErrorStreamCaptureImplicit if it is the default
    stream (pytorch/pytorch#180090). Megatron-LM's own training creates its wrapper the same way.

    Yields:
        Nothing.
    """
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
    usual, own = torch.cuda.current_stream(), torch.cuda.Stream()
    own.wait_stream(usual)
    with torch.cuda.stream(own):
        yield
    usual.wait_stream(own)
