"""Adam's state as boxes of whole tensors: each rank saves and loads what it has, however that is cut.

A distributed optimizer gives each data parallel rank a range of every parameter's elements. megatron-core
saves such ranges in a form that only the same layout can load, or gathers all of them on one rank; a range of
a tensor's elements is a few boxes, and boxes are what torch's checkpoint format is made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from megatron_dlm.checkpointing.safe_metadata import force_weights_only
from megatron_dlm.checkpointing.tensor_chunks import (
    PREFIX,
    LoadPlanner,
    TensorChunks,
    average_key,
    main_weight_key,
)
from megatron_dlm.platform import distributed_optimizer
from megatron_dlm.platform.fully_sharded import local
from megatron_dlm.platform.megatron import SavePlannerBase

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size along each axis."""


def boxes(shape: Sequence[int], start: int, end: int) -> list[Box]:
    """Cut a range of a tensor's elements, counted in row-major order, into boxes.

    Args:
        shape: of the tensor.
        start: first element.
        end: behind the last element; `start` gives no box.

    Returns:
        The boxes in order: at most 2 n - 1 for n axes.
    """
    if start >= end:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])

    def part_of_row(index: int, begin: int, stop: int) -> list[Box]:
        return [((index, *offset), (1, *size)) for offset, size in boxes(shape[1:], begin, stop)]

    (first, skipped), (last, taken) = divmod(start, row), divmod(end, row)
    if first == last:
        return part_of_row(first, skipped, taken)
    found = part_of_row(first, skipped, row) if skipped else []
    first += bool(skipped)
    if first < last:
        found.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return found + (part_of_row(last, 0, taken) if taken else [])


class SavePlanner(SavePlannerBase):
    """megatron-core's save planner, which here also finds the pieces in `TensorChunks`."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """What is to be written: a piece, or as the base class has it."""
        found = self.state_dict[index.fqn]
        return found.at(index.offset) if isinstance(found, TensorChunks) else super().lookup_object(index)


def state_to_save(
    optimizer: Any, sharded: Mapping[torch.nn.Parameter, ShardedTensor]
) -> dict[str, TensorChunks]:
    """Adam's state that this rank saves: moments, and fp32 main weights if modules use another precision.

    For fully sharded parameters it includes the weights in the precision that modules use.

    Args:
        optimizer: megatron-core's optimizer.
        sharded: where each parameter of this process's stage lies in the whole model.

    Returns:
        Pieces by key; other ranks have other pieces of the same keys. They share memory with the optimizer,
        but for rounded weights.
    """
    return _collect(optimizer, sharded, to_save=True)


def load_state(
    directory: Path,
    optimizer: Any,
    sharded: Mapping[torch.nn.Parameter, ShardedTensor],
    *,
    averaged: bool,
) -> None:
    """Read Adam's state into the optimizer, and weights into sharded parameters. All ranks call it.

    Args:
        directory: a checkpoint that `verify_on_all_ranks` has accepted.
        optimizer: megatron-core's; changed in place.
        sharded: where each parameter to load for lies in the whole model, none twice.
        averaged: whether the run keeps averages of the weights; where the checkpoint has none, they begin
            anew.
    """
    if averaged and _has_averages(directory, sharded):
        for part, _, main, _, _ in distributed_optimizer.main_pieces(optimizer, sharded):
            distributed_optimizer.average_of(part, main)
    wanted = _collect(optimizer, sharded, to_save=False)
    # What the checkpoint has not is padding that another layout did without.
    for pieces in wanted.values():
        pieces.fill_with_zeros()
    with force_weights_only(True):
        load(wanted, storage_reader=FileSystemReader(directory), planner=LoadPlanner())


def _has_averages(directory: Path, sharded: Mapping[torch.nn.Parameter, ShardedTensor]) -> bool:
    stored = FileSystemReader(directory).read_metadata().state_dict_metadata
    return any(average_key(place.key) in stored for place in sharded.values())


def _collect(
    optimizer: Any, sharded: Mapping[torch.nn.Parameter, ShardedTensor], *, to_save: bool
) -> dict[str, TensorChunks]:
    found: dict[str, TensorChunks] = {}
    cut = distributed_optimizer.is_sharded(optimizer)
    for part, parameter, main, start, end in distributed_optimizer.main_pieces(optimizer, sharded):
        place = sharded[parameter]
        # Replicas along the data axis have different ranges where the optimizer is distributed.
        replica = place.replica_id[:-1] if cut else place.replica_id
        if to_save and any(replica):
            continue
        tensors = _state(part, main, place)
        if isinstance(parameter, DTensor) and (to_save or place.dtype == parameter.dtype):
            # Rounded ones are made of the main weights, so nobody reads them.
            tensors[place.key] = parameter.to(place.dtype)
        for key, tensor in tensors.items():
            pieces = found.setdefault(key, TensorChunks(place.global_shape))
            for offset, piece in _cut(place, local(tensor.detach()).view(-1), start, end):
                pieces.add(offset, piece)
    return found


def _state(part: Any, main: Tensor, place: ShardedTensor) -> dict[str, Tensor]:
    """Moments by key, and the main weights of what modules see in lower precision."""
    state = distributed_optimizer.state_of(part, main)
    tensors = {f"{PREFIX}{name}.{place.key}": state[name] for name in distributed_optimizer.MOMENTS}
    if distributed_optimizer.AVERAGE in state:
        tensors[average_key(place.key)] = state[distributed_optimizer.AVERAGE]
    return tensors if place.dtype == torch.float32 else tensors | {main_weight_key(place.key): main}


def _cut(
    place: ShardedTensor, elements: Tensor, start: int, end: int
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Offset in the whole tensor, and view, of each box of a range of the local tensor."""
    ahead = len(place.global_shape) - len(place.local_shape)
    done = 0
    for offset, size in boxes(place.local_shape, start, end):
        count = math.prod(size)
        where = (
            *place.global_offset[:ahead],
            *map(sum, zip(place.global_offset[ahead:], offset, strict=True)),
        )
        yield where, elements[done : done + count].view((1,) * ahead + size)
        done += count
