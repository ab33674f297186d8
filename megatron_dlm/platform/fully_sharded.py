"""Parameters sharded over data parallel ranks (ZeRO-3): megatron-core's wrapper of torch's FSDP2.

A sharded parameter is a DTensor cut along its first dimension: each rank holds a range of its elements, and
the modules that use it see all of it while they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import TorchFullyShardedDataParallel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class FullyShardedDataParallel(TorchFullyShardedDataParallel):
    """megatron-core's, which leaves out what `finalize_model_grads` asks of a wrapper (0.16.1)."""

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Nothing: every backward pass has left its mean over the ranks in the shards."""

    def scale_gradients(self, scaling_factor: Any) -> None:
        """Make the means over the ranks sums, and scale them."""
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                local(parameter.grad).mul_(scaling_factor * self.process_group.size())


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that may be sharded; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_range(tensor: Tensor) -> tuple[int, int]:
    """First element, in row-major order, that this rank has of a tensor that may be sharded, and the end."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.numel()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    row = tensor.shape[1:].numel()
    return offset[0] * row, (offset[0] + shape[0]) * row


def sharded_names(module: nn.Module) -> set[str]:
    """Parameters of which this rank has a part."""
    return {name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)}


@contextmanager
def stand_ins(module: nn.Module) -> Iterator[None]:
    """Whole parameters without memory in the place of sharded ones, to ask the module for shapes and places.

    Args:
        module: changed until the context ends.
    """
    changed = []
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                changed.append((part, name, parameter))
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                part._parameters[name] = nn.Parameter(whole)
    try:
        yield
    finally:
        for part, name, parameter in changed:
            part._parameters[name] = parameter
