"""Sizes of blocks and accumulators that all kernels share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_WITHOUT_GPU = 8


@cache
def programs_of(device: torch.device, of_a_processor: int) -> int:
    """Number of programs for a kernel whose programs loop over rows, so that all run and end together.

    Args:
        device: device that the kernel runs on.
        of_a_processor: programs that a multiprocessor runs at once, as registers and warps allow.

    Returns:
        Number of programs; a backward pass writes one partial sum per program.
    """
    if device.type != "cuda":
        return PROGRAMS_WITHOUT_GPU
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return int(count) * of_a_processor


def wide_dtype(tensor: Tensor) -> Any:
    """Triton's dtype to compute `tensor` in: float32, or float64 for float64."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def block_of(width: int, largest: int) -> int:
    """A power of two that holds `width`, or `largest`."""
    return min(largest, triton.next_power_of_2(width))


def tiles_of(width: int) -> tuple[int, int]:
    """Two powers of two that hold `width` together with the fewest lanes idle; the second may be 0."""
    whole: int = triton.next_power_of_2(width)
    main = whole if whole == width else whole // 2
    tail: int = triton.next_power_of_2(width - main) if main < width else 0
    return (main, tail) if main + tail < whole else (whole, 0)
