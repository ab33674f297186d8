"""The matrix-product speed of this device, which utilisation is measured against."""

from __future__ import annotations

import time

import torch

# Large enough to reach the device's speed, small enough not to be noticed at start.
_SIZE = {"cuda": 8192, "cpu": 1024}
_REPEATS = 5


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Highest measured speed of a few square matrix products on this process's device and threads.

    Args:
        device: device of this process; on a CPU processes share the cores, so all should measure together.
        dtype: dtype of the matrix products in training.

    Returns:
        Speed in FLOP/s.
    """
    size = _SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
