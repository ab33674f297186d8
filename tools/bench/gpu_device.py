"""What the device itself does: its matrix products, its memory, and what its maker says of it."""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

import torch

from megatron_dlm.platform.device_flops import matmul_flops_per_second

DATASHEETS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bf16 FLOP/s by a part of the device's name, the first that fits: NVIDIA's product datasheets, whose
figures with sparsity are halved; H100 and H200 without a suffix are the SXM modules."""
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
_REPEATS = 5


def datasheet_flops_per_second(name: str) -> float | None:
    """Dense bf16 products by the datasheet; None for a device that the table lacks."""
    return next((flops for part, flops in DATASHEETS.items() if part in name), None)


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written a second, by the best of a few copies of a large tensor."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_REPEATS):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * source.nbytes / best


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_of(device: torch.device) -> dict[str, Any]:
    """Name, versions and speeds of the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "transformer-engine", "megatron-core")},
        "matmul_flops_per_second": matmul_flops_per_second(device, torch.bfloat16),
        "datasheet_flops_per_second": datasheet_flops_per_second(name),
        "copy_bytes_per_second": copy_bytes_per_second(device),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
