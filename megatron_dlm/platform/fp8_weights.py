"""Weights that Transformer Engine keeps in FP8: bytes and a scale behind a tensor that looks like bf16."""

from __future__ import annotations

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor


def is_fp8(tensor: Tensor) -> bool:
    """Whether the tensor is an FP8 weight of Transformer Engine; always False if that is not installed."""
    return bool(is_float8tensor(tensor))


def plain(tensor: Tensor) -> Tensor:
    """The values of an FP8 weight in bf16; any other tensor itself."""
    return dequantize_fp8_tensor(tensor) if is_fp8(tensor) else tensor


def bits(tensor: Tensor) -> Tensor:
    """The bytes of an FP8 weight, without its scales; any other tensor itself."""
    if not is_fp8(tensor):
        return tensor
    # Scaled by the tensor, or by blocks.
    found: Tensor = getattr(tensor, "_data" if hasattr(tensor, "_data") else "_rowwise_data")
    return found


@torch.no_grad()
def set_first_value(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter its value before an optimizer is made for it.

    Args:
        parameter: changed in place.
        value: float32, of its shape.
    """
    parameter.copy_(value)
    if hasattr(parameter, "_high_precision_init_val"):
        # What the optimizer's main weights begin with, instead of what FP8 has left of it.
        parameter._high_precision_init_val = value.cpu().contiguous()
