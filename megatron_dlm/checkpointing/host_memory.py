"""Host memory that a save copies GPU tensors to, and that its writing process reads."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; where each copy begins."""
_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every CUDA context of the process."""


class HostMemory:
    """One region of pinned host memory, which belongs to one save at a time.

    Not torch's pinned memory: a process shares or copies such pages with its forks as the driver pleases, and
    torch hands a freed block out again while the fork still reads it. These pages are shared with forks by
    definition (an anonymous shared mapping, so no room in /dev/shm is needed) and are kept for the next save.
    """

    def __init__(self) -> None:
        self._region: mmap.mmap | None = None
        self._unpin: weakref.finalize[Any, HostMemory] | None = None
        self._is_held = False
        self._last_reader: BaseProcess | None = None

    def hold(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy tensors; nobody else may use the memory until `release`.

        Args:
            tensors: on one device.

        Returns:
            CPU tensors of the same shapes and values, each with a storage of its own, on pinned memory where
            the tensors are on a GPU. Nothing is being copied any more.

        Raises:
            MemoryError: the host has not enough memory, or it cannot be pinned.
        """
        assert not self._is_held, "another save has the memory"
        if self._last_reader is not None:
            self._last_reader.join()
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        region = self._region_of(end, pinned=on_gpu)
        self._is_held = True
        copies = []
        for tensor, start in zip(tensors, starts, strict=True):
            count = math.prod(tensor.shape)
            # A buffer of no elements is refused.
            flat = torch.frombuffer(region, dtype=tensor.dtype, count=max(1, count), offset=start)
            copy = flat[:count].view(tensor.shape)
            copy.copy_(tensor.detach(), non_blocking=True)
            copies.append(copy)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def release(self, reader: BaseProcess | None = None) -> None:
        """Let the next save have the memory, once its reader has ended.

        Args:
            reader: the writing process, which has done its work or was killed; None where none was started,
                and the one before may still be ending.
        """
        self._is_held = False
        self._last_reader = reader or self._last_reader

    def _region_of(self, num_bytes: int, *, pinned: bool) -> mmap.mmap:
        # One element more than nothing, for tensors without any.
        num_bytes += ALIGNMENT
        if self._region is None or len(self._region) < num_bytes:
            self._give_back()
            try:
                self._region = mmap.mmap(-1, num_bytes)
            except OSError as error:
                raise MemoryError(f"{num_bytes:,} bytes of host memory: {error.strerror}") from error
        if pinned and self._unpin is None:
            self._pin(self._region)
        return self._region

    def _pin(self, region: mmap.mmap) -> None:
        address = torch.frombuffer(region, dtype=torch.uint8).data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(address, len(region), _PORTABLE))
        if code:
            # CUDA keeps its last error for whoever asks next; let it be this kernel, not one of training's.
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")
            raise MemoryError(f"{len(region):,} bytes of host memory cannot be pinned: CUDA error {code}")
        # Also where this object is forgotten: the system hands the address out again, and CUDA refuses to
        # pin what it believes is pinned.
        self._unpin = weakref.finalize(self, _unpin, address)
        self._unpin.atexit = False

    def _give_back(self) -> None:
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        # The mapping ends with the last tensor on it.
        self._region = None


def _unpin(address: int) -> None:
    # A child has no CUDA, and the pages of its parent are not its to give back.
    if torch.cuda.is_available():
        torch.cuda.cudart().cudaHostUnregister(address)
