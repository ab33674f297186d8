"""An NVIDIA DALI pipeline that carries batches to the device ahead of their use.

DALI reads, shuffles and decodes nothing here: what it is given comes out in order, bit for bit.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dlm.interfaces import InputError

ALIGNMENT = 16
"""Bytes; where each tensor begins in the buffer that holds them all."""
QUEUE_DEPTH = 2
"""Batches on their way."""


def require_dali() -> None:
    """Refuse a machine without DALI.

    Raises:
        InputError: the package is not there.
    """
    try:
        found = importlib.util.find_spec("nvidia.dali")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise InputError(
            "data.loader: dali needs NVIDIA DALI: pip install 'megatron-dlm[dali]' (for CUDA 12 "
            "nvidia-dali-cuda120)"
        )


def carry_with_dali(batches: Iterator[Sequence[Tensor]], device_index: int | None) -> Iterator[list[Tensor]]:
    """Bring tensors to a device while earlier ones are worked on.

    The tensors of a batch, whose number, shapes and types may change, travel as the bytes of one buffer: one
    copy for each batch, from pinned memory.

    Args:
        batches: tensors on the CPU.
        device_index: of the GPU; None carries them to the CPU, through the same pipeline.

    Yields:
        The tensors of each batch, in order.
    """
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    waiting: deque[list[tuple[torch.dtype, torch.Size]]] = deque()

    def buffers() -> Iterator[list[NDArray[np.uint8]]]:
        for tensors in batches:
            waiting.append([(tensor.dtype, tensor.shape) for tensor in tensors])
            yield [_packed(tensors)]

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_index, prefetch_queue_depth=QUEUE_DEPTH)
    with pipeline:
        buffer = fn.external_source(source=buffers(), dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(buffer if device_index is None else buffer.gpu())
    pipeline.build()
    for (outputs,) in DALIGenericIterator(pipeline, ["buffer"], auto_reset=False):
        yield _unpacked(outputs["buffer"][0], waiting.popleft())


def _packed(tensors: Sequence[Tensor]) -> NDArray[np.uint8]:
    starts = _starts([tensor.nbytes for tensor in tensors])
    buffer = np.zeros(starts[-1], dtype=np.uint8)
    for start, tensor in zip(starts, tensors, strict=False):
        buffer[start : start + tensor.nbytes] = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return buffer


def _unpacked(buffer: Tensor, kinds: list[tuple[torch.dtype, torch.Size]]) -> list[Tensor]:
    sizes = [shape.numel() * dtype.itemsize for dtype, shape in kinds]
    return [
        buffer[start : start + size].view(dtype).view(shape)
        for start, size, (dtype, shape) in zip(_starts(sizes), sizes, kinds, strict=False)
    ]


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each piece begins, and the end."""
    return [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
