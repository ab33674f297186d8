"""Many tensors as one: the bytes of all in a buffer that travels at once, tensors that occur twice once."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes; where each tensor begins."""


@dataclass(frozen=True)
class Layout:
    """Where tensors are in a buffer."""

    places: tuple[tuple[torch.dtype, torch.Size, int], ...]
    """Dtype, shape and first byte of each tensor; tensors that share memory share a place."""
    num_bytes: int

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Layout:
        """A layout of tensors one behind the other."""
        starts: dict[Any, int] = {}
        places, end = [], 0
        for tensor in tensors:
            # Not by identity: a family's attention mask is a new view of one memory in each microbatch.
            what = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if what not in starts:
                starts[what] = end
                end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            places.append((tensor.dtype, tensor.shape, starts[what]))
        return Layout(tuple(places), end)


def pack(tensors: Sequence[Tensor], layout: Layout, out: Tensor | None = None) -> Tensor:
    """The bytes of some tensors.

    Args:
        tensors: on the CPU.
        layout: theirs.
        out: uint8 [layout.num_bytes] to write to, whose bytes between tensors stay as they are.

    Returns:
        uint8 [layout.num_bytes].
    """
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8) if out is None else out
    done: set[int] = set()
    for tensor, (_, _, start) in zip(tensors, layout.places, strict=True):
        if tensor.nbytes and start not in done:
            buffer[start : start + tensor.nbytes] = tensor.contiguous().flatten().view(torch.uint8)
            done.add(start)
    return buffer


def unpack(buffer: Tensor, layout: Layout) -> list[Tensor]:
    """The tensors of a buffer, sharing its memory.

    Args:
        buffer: from `pack`, on any device.
        layout: of the tensors.

    Returns:
        The tensors.
    """
    return [
        buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for dtype, shape, start in layout.places
    ]


def without_tensors(content: Any) -> tuple[bytes, list[Tensor]]:
    """An object for another process of this program, and the tensors it holds.

    Args:
        content: anything that can be pickled.

    Returns:
        All of it but the tensors, and those.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(content)
    return file.getvalue(), pickler.tensors


def with_tensors(pickled: bytes, tensors: Sequence[Tensor]) -> Any:
    """The object again.

    Args:
        pickled: by `without_tensors`, in a process of this program.
        tensors: that belong into it.

    Returns:
        The object.
    """
    return _Unpickler(io.BytesIO(pickled), tensors).load()


class _Pickler(pickle.Pickler):
    """Leaves tensors out."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Puts them back."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]
