"""An NVIDIA DALI pipeline that copies batches to the device ahead of their use.

DALI does not read, shuffle or decode here: batches come out in order and unchanged, bit for bit.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dlm.data.loading.tensor_buffer import Layout, pack, unpack
from megatron_dlm.interfaces import InputError

QUEUE_DEPTH = 2
"""Number of batches that DALI prefetches."""


def require_dali() -> None:
    """Refuse a machine without DALI.

    Raises:
        InputError: the package nvidia.dali is not installed.
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


def transfer_with_dali(batches: Iterator[Sequence[Tensor]], device: torch.device) -> Iterator[list[Tensor]]:
    """Copy tensors to a device while earlier batches are in use.

    The tensors of a batch, whose number, shapes and types may change, travel as the bytes of one buffer: one
    copy for each batch, from pinned memory.

    Args:
        batches: tensors on the CPU.
        device: a GPU, or the CPU, through the same pipeline.

    Yields:
        The tensors of each batch, in order.
    """
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    waiting: deque[Layout | InputError] = deque()

    def buffers() -> Iterator[list[NDArray[np.uint8]]]:
        try:
            for tensors in batches:
                layout = Layout.of(tensors)
                waiting.append(layout)
                yield [pack(tensors, layout).numpy()]
        except InputError as error:
            # Of a batch that nobody has asked for yet; those before it are good.
            waiting.append(error)
            yield [np.zeros(1, dtype=np.uint8)]

    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=1,
        num_threads=1,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=QUEUE_DEPTH,
    )
    with pipeline:
        buffer = fn.external_source(source=buffers(), dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(buffer.gpu() if on_gpu else buffer)
    pipeline.build()
    for (outputs,) in DALIGenericIterator(pipeline, ["buffer"], auto_reset=False):
        layout = waiting.popleft()
        if isinstance(layout, InputError):
            raise layout
        yield unpack(outputs["buffer"][0], layout)
