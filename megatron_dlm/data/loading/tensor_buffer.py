"""Packs a batch's tensors into one buffer for a single copy; a tensor that occurs twice is packed once."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Alignment in bytes: each tensor begins at a multiple of it."""


@dataclass(frozen=True)
class Layout:
    """Places of tensors in a buffer."""

    places: tuple[tuple[torch.dtype, torch.Size, int], ...]
    """Dtype, shape and first byte of each tensor; tensors that share memory share a place."""
    num_bytes: int

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Layout:
        """The layout that places tensors one after another; tensors that share memory share a place."""
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
    """Copy tensors into one buffer.

    Args:
        tensors: tensors on the CPU.
        layout: layout of the tensors, from `Layout.of`.
        out: buffer to write to, uint8 [layout.num_bytes]; padding between tensors is left unchanged. None: a
            new buffer.

    Returns:
        The buffer, uint8 [layout.num_bytes].
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
        buffer: buffer from `pack`, on any device.
        layout: layout of the tensors in the buffer.

    Returns:
        The tensors.
    """
    return [
        buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for dtype, shape, start in layout.places
    ]


def without_tensors(content: Any) -> tuple[bytes, list[Tensor]]:
    """Pickle an object without its tensors, to send it to another process of this program.

    Args:
        content: anything that can be pickled.

    Returns:
        The pickled object without its tensors, and the tensors.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(content)
    return file.getvalue(), pickler.tensors


def with_tensors(pickled: bytes, tensors: Sequence[Tensor]) -> Any:
    """Restore an object pickled by `without_tensors`.

    Args:
        pickled: bytes from `without_tensors`, from a process of this program.
        tensors: tensors of the object, in the order `without_tensors` returned them.

    Returns:
        The object.
    """
    return _Unpickler(io.BytesIO(pickled), tensors).load()


class _Pickler(pickle.Pickler):
    """Pickler that leaves tensors out and collects them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Unpickler that puts the tensors back."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]
