"""Boxes of whole tensors, as torch's distributed checkpoints hold and read them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from torch import Size, Tensor
from torch.distributed.checkpoint import ChunkStorageMetadata, DefaultLoadPlanner, Metadata
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dlm.interfaces import InputError

MAIN_WEIGHT, AVERAGE = "fp32_param", "ema"
PREFIX = "optimizer.state."


def main_weight_key(key: str) -> str:
    """Checkpoint key of a tensor's fp32 main weights, which exist if its parameters are not fp32."""
    return f"{PREFIX}{MAIN_WEIGHT}.{key}"


def average_key(key: str) -> str:
    """Checkpoint key of the moving average of a tensor's weights (`optimizer.ema_decay`)."""
    return f"{PREFIX}{AVERAGE}.{key}"


def weight_key(key: str, stored: Container[str], *, averaged: bool) -> str:
    """Checkpoint key of a tensor's weights at their highest precision.

    Args:
        key: of the tensor as modules have it.
        stored: keys of the checkpoint.
        averaged: whether the moving average is asked for.

    Returns:
        Key of the average, of the main weights if there are any, or `key`.

    Raises:
        InputError: the checkpoint has no averages.
    """
    if averaged:
        if average_key(key) not in stored:
            raise InputError("averaged: the run has no averages of its weights (optimizer.ema_decay 0)")
        return average_key(key)
    main = main_weight_key(key)
    return main if main in stored else key


class TensorChunks:
    """Boxes of one tensor that this rank holds; torch calls `__create_write_items__` to plan a save."""

    def __init__(self, global_shape: Sequence[int] = ()) -> None:
        """Start without boxes.

        Args:
            global_shape: shape of the whole tensor; not needed for reading.
        """
        self._global_shape = Size(global_shape)
        self._pieces: dict[tuple[int, ...], Tensor] = {}

    def add(self, offset: tuple[int, ...], piece: Tensor) -> None:
        """Add a box.

        Args:
            offset: offset of the box's first element in the whole tensor.
            piece: elements of the box, with as many axes as the whole tensor.
        """
        self._pieces[offset] = piece

    @property
    def tensors(self) -> list[Tensor]:
        """The pieces, in the order they were added."""
        return list(self._pieces.values())

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Take other tensors of the same shapes, in the order of `tensors`."""
        self._pieces = dict(zip(self._pieces, tensors, strict=True))

    def __create_write_items__(self, name: str, pieces: TensorChunks) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(Size(offset), piece.shape),
                    properties=TensorProperties.create_from_tensor(piece),
                    size=self._global_shape,
                ),
            )
            for offset, piece in self._pieces.items()
        ]

    def chunks(self) -> list[ChunkStorageMetadata]:
        """Offset and size of each piece."""
        return [ChunkStorageMetadata(Size(offset), piece.shape) for offset, piece in self._pieces.items()]

    def at(self, offset: Sequence[int] | None) -> Tensor:
        """The piece that was added with this offset."""
        return self._pieces[tuple(offset or ())]

    def fill_with_zeros(self) -> None:
        """Set all elements of all pieces to 0."""
        for piece in self._pieces.values():
            piece.zero_()


class LoadPlanner(DefaultLoadPlanner):
    """torch's load planner, for a state dict of `TensorChunks`."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the pieces as they are; the base class would drop what is no tensor."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """What to read: all that the checkpoint has of each piece."""
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        items = []
        for name, pieces in self.state_dict.items():
            tensor = stored.get(name)
            if not isinstance(tensor, TensorStorageMetadata):
                raise InputError(f"checkpoint: has no tensor {name}")
            items += create_read_items_for_chunk_list(name, tensor, pieces.chunks())
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The piece to read into."""
        piece: Tensor = self.state_dict[index.fqn].at(index.offset)
        return piece
