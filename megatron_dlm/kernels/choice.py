"""Whether a run computes with Triton kernels or with plain PyTorch."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Literal

from megatron_dlm.interfaces import InputError

if TYPE_CHECKING:
    import torch

Kernels = Literal["auto", "torch", "triton"]
"""auto: Triton on CUDA, PyTorch on a CPU. triton on a CPU runs in Triton's interpreter, slowly, for tests."""
INTERPRETER = "TRITON_INTERPRET"


def wants_triton(kernels: Kernels, device: torch.device) -> bool:
    """Whether kernels of this package run on `device`.

    Args:
        kernels: what was asked for.
        device: of the run.

    Returns:
        True for Triton, False for PyTorch.

    Raises:
        InputError: Triton is asked for, or needed on CUDA, and not there.
    """
    if kernels == "torch" or (kernels == "auto" and device.type == "cpu"):
        return False
    if importlib.util.find_spec("triton") is None:
        raise InputError(f"training.kernels: {kernels} on {device.type} needs triton; or choose torch")
    if device.type == "cpu" and os.environ.get(INTERPRETER) != "1":
        raise InputError(
            f"training.kernels: triton on a CPU runs in its interpreter only: set {INTERPRETER}=1"
        )
    return True
