"""Parameters sharded over data parallel ranks (ZeRO-3) by torch's FSDP2.

A sharded parameter is a DTensor cut along its first dimension: each rank holds a range of its elements, and
the modules that use it see all of it while they run, rounded to their own precision. In bf16 the shards are
the fp32 main weights; no rank has any other copy that lasts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_dlm.platform.megatron import DataParallelBase


class FullyShardedDataParallel(DataParallelBase):
    """Data parallel wrapper for megatron-core's schedules around a model sharded by torch's FSDP2.

    megatron-core 0.16.1's own FSDP2 wrapper has no option for the dtype of gathered weights and does not
    scale gradients.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        module: nn.Module,
        parts: tuple[type[nn.Module], ...],
    ) -> None:
        """Shard `module`; all ranks call it.

        Args:
            config: its `params_dtype` is what modules see their weights in.
            ddp_config: kept for megatron-core.
            module: float32 weights, whole and with their values; changed in place.
            parts: classes of what gathers its weights by itself; the rest is gathered together.
        """
        super().__init__(config=config, module=module)
        self.ddp_config = ddp_config
        self.process_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        # pytorch/pytorch#136929: the new parameters lack megatron-core's marks.
        marks = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
        self._shard(module, parts)
        for name, parameter in module.named_parameters():
            vars(parameter).update(marks[name])

    def _shard(self, module: nn.Module, parts: tuple[type[nn.Module], ...]) -> None:
        mesh = DeviceMesh.from_group(self.process_group, next(module.parameters()).device.type)
        # Inputs stay as they are: the residual stream and the conditioning vector are float32.
        precision = MixedPrecisionPolicy(
            param_dtype=self.config.params_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        shard = partial(fully_shard, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        previous: FSDPModule | None = None
        for part in [part for part in module.modules() if isinstance(part, parts)]:
            sharded = shard(part)
            if self.config.recompute_granularity is not None:
                # The order of forward passes, which says what to gather next, is spoilt by their repetition.
                sharded.set_modules_to_backward_prefetch([previous] if previous else [])
            previous = sharded
        shard(module)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Nothing: every backward pass has left its mean over the ranks in the shards."""

    def scale_gradients(self, scaling_factor: Any) -> None:
        """Make the means over the ranks sums, and scale them."""
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                local(parameter.grad).mul_(scaling_factor * self.process_group.size())


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor itself if it is not sharded; shares memory."""
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
def stand_ins(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Temporarily replace sharded parameters by unsharded meta tensors, to query the module for full shapes.

    Args:
        module: module to change until the context ends.
        dtype: dtype of the meta tensors, the one in which the module computes with its weights.
    """
    changed = []
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                changed.append((part, name, parameter))
                whole = torch.empty(parameter.shape, dtype=dtype, device="meta")
                part._parameters[name] = nn.Parameter(whole)
    try:
        yield
    finally:
        for part, name, parameter in changed:
            part._parameters[name] = parameter
