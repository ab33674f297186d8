"""Sizes of blocks and accumulators that all kernels share."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512
"""Several for each multiprocessor of a large GPU; backward passes leave as many partial sums."""


def wide_dtype(tensor: Tensor) -> Any:
    """Triton's dtype to compute `tensor` in: float32, or float64 for float64."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def block_of(width: int, largest: int) -> int:
    """A power of two that holds `width`, or `largest`."""
    return min(largest, triton.next_power_of_2(width))
