"""Many tensors as one: the bytes of all in a buffer that travels at once."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes; where each tensor begins."""

Kind = tuple[torch.dtype, torch.Size]
"""What a tensor was, to find it again."""


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of some tensors.

    Args:
        tensors: on the CPU.

    Returns:
        uint8, of one dimension.
    """
    starts = _starts([tensor.nbytes for tensor in tensors])
    buffer = torch.zeros(starts[-1], dtype=torch.uint8)
    for start, tensor in zip(starts, tensors, strict=False):
        buffer[start : start + tensor.nbytes] = tensor.contiguous().flatten().view(torch.uint8)
    return buffer


def unpack(buffer: Tensor, kinds: Sequence[Kind]) -> list[Tensor]:
    """The tensors of a buffer, sharing its memory.

    Args:
        buffer: from `pack`, on any device.
        kinds: dtype and shape of each tensor that was packed.

    Returns:
        The tensors.
    """
    sizes = [shape.numel() * dtype.itemsize for dtype, shape in kinds]
    return [
        buffer[start : start + size].view(dtype).view(shape)
        for start, size, (dtype, shape) in zip(_starts(sizes), sizes, kinds, strict=False)
    ]


def kinds_of(tensors: Sequence[Tensor]) -> list[Kind]:
    """What `unpack` needs to know of tensors."""
    return [(tensor.dtype, tensor.shape) for tensor in tensors]


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each piece begins, and the end."""
    return [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]


class Parcel:
    """Any picklable object for another process, all its tensors in one buffer.

    torch sends each tensor as a file descriptor, of which a batch of many microbatches would need more than a
    process may have.
    """

    def __init__(self, content: Any) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(content)
        self._pickled = file.getvalue()
        self._kinds = kinds_of(pickler.tensors)
        self._buffer = pack(pickler.tensors)

    def content(self) -> Any:
        """The object again; its tensors share the parcel's memory."""
        return _Unpickler(io.BytesIO(self._pickled), unpack(self._buffer, self._kinds)).load()


class _Pickler(pickle.Pickler):
    """Leaves tensors out, each once however often it occurs."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._places[id(obj)]


class _Unpickler(pickle.Unpickler):
    """Reads what a process of this program has written."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]
