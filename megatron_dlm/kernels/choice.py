"""Whether a run computes with Triton kernels or with plain PyTorch."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import TYPE_CHECKING, Literal

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.gpu import capability, name_of
from megatron_dlm.platform.launch import detect_environment

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
Kernels = Literal["auto", "torch", "triton"]
"""auto: Triton on CUDA from compute capability 8.0 on, else PyTorch. triton on a CPU runs in Triton's
interpreter, slowly, for tests."""
INTERPRETER = "TRITON_INTERPRET"
LEAST_CAPABILITY = (8, 0)
"""Lowest compute capability of the GPUs that the tests compile the kernels for."""


def wants_triton(kernels: Kernels, device: torch.device) -> bool:
    """Whether kernels of this package run on `device`.

    Args:
        kernels: requested kernels.
        device: device of the run.

    Returns:
        True for Triton, False for PyTorch.

    Raises:
        InputError: Triton is asked for, or needed on CUDA, and not there.
    """
    if kernels == "torch" or (kernels == "auto" and device.type == "cpu"):
        return False
    if kernels == "auto" and capability(device) < LEAST_CAPABILITY:
        if detect_environment().rank == 0:
            logger.warning(f"training.kernels: auto takes PyTorch's on {name_of(device)}; Triton's need 8.0")
        return False
    if importlib.util.find_spec("triton") is None:
        raise InputError(f"training.kernels: {kernels} on {device.type} needs triton; or choose torch")
    if device.type == "cpu" and os.environ.get(INTERPRETER) != "1":
        raise InputError(
            f"training.kernels: triton on a CPU runs in its interpreter only: set {INTERPRETER}=1"
        )
    return True
