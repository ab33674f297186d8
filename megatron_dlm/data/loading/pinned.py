"""Copies batches to a GPU from pinned memory on a separate stream, while earlier batches are in use."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_dlm.data.loading.tensor_buffer import Layout, pack, unpack
from megatron_dlm.interfaces import InputError


def transfer_from_pinned_memory(
    batches: Iterator[Sequence[Tensor]], device: torch.device
) -> Iterator[list[Tensor]]:
    """Copy tensors to a device; the next batch is copied while the current one is in use.

    The tensors of a batch, whose number, shapes and types may change, travel as the bytes of one buffer.

    Args:
        batches: tensors on the CPU.
        device: a GPU; on a CPU, with platform/cpu.py installed, copies are made at once.

    Yields:
        The tensors of each batch, in order. Their memory is reused once the next batch is requested.
    """
    stream = torch.cuda.Stream(device)
    buffers = itertools.cycle([_Buffer(device, stream), _Buffer(device, stream)])
    arriving: _Buffer | None = None
    failure: InputError | None = None
    more = True
    while more:
        following: _Buffer | None = None
        try:
            tensors = next(batches)
        except StopIteration:
            more = False
        except InputError as error:
            # Of a batch that nobody has asked for yet; the one before it is good.
            more, failure = False, error
        else:
            following = next(buffers)
            following.send(tensors)
        if arriving is not None:
            yield arriving.receive()
            arriving.work_is_queued()
        arriving = following
    if failure is not None:
        raise failure


class _Buffer:
    """Buffers for one batch: one in pinned memory, one on the device."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device, self._stream = device, stream
        self._sent, self._read = torch.cuda.Event(), torch.cuda.Event()
        self._layout = Layout((), 0)
        self._make(0)

    def _make(self, num_bytes: int) -> None:
        self._pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(self._stream):
            self._on_device = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Start copying a batch, after the work on the previous batch in this buffer is done."""
        # What was sent before has left the pinned memory.
        self._sent.synchronize()
        self._stream.wait_event(self._read)
        self._layout = Layout.of(tensors)
        num_bytes = self._layout.num_bytes
        if num_bytes > self._pinned.numel():
            self._make(num_bytes)
        pack(tensors, self._layout, self._pinned[:num_bytes])
        with torch.cuda.stream(self._stream):
            self._on_device[:num_bytes].copy_(self._pinned[:num_bytes], non_blocking=True)
            self._sent.record(self._stream)

    def receive(self) -> list[Tensor]:
        """The batch on the device, for work that is queued from now on."""
        torch.cuda.current_stream().wait_event(self._sent)
        return unpack(self._on_device[: self._layout.num_bytes], self._layout)

    def work_is_queued(self) -> None:
        """Note that all work that reads the batch has been queued in the current stream."""
        self._read.record(torch.cuda.current_stream())
