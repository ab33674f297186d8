"""The MLP's bias and tanh-GELU (arXiv:1606.08415): one pass each way over its widest tensor, in Triton.

Computed as x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh(u)) / 2.
Shape legend: R rows, w width of the MLP on this rank; G groups of rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dlm.kernels.block_sizes import block_of, programs_of, wide_dtype

LARGEST_BLOCK = 1024
WARPS = 4
"""Warps of a program, which computes one block of columns."""
PROGRAMS = 8
"""Programs of a multiprocessor in the backward pass."""
SLOPE = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _twice_u(x):
    return (x + x * x * x * CUBIC) * SLOPE


@triton.jit
def _forward(x, bias, y, width, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(WIDE)
    value += tl.load(bias + columns, mask=inside, other=0.0).to(WIDE)
    share = 1.0 / (1.0 + tl.exp(-_twice_u(value)))
    tl.store(y + row * width + columns, value * share, mask=inside)


@triton.jit
def _backward(dy, x, bias, dx, sums, rows, width, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    group, groups = tl.program_id(0), tl.num_programs(0)
    first = group.to(tl.int64) * width
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    offset = tl.load(bias + columns, mask=inside, other=0.0).to(WIDE)
    total = tl.zeros([BLOCK], WIDE)
    place = first + columns
    for _ in range(group, rows, groups):
        value = tl.load(x + place, mask=inside, other=0.0).to(WIDE) + offset
        share = 1.0 / (1.0 + tl.exp(-_twice_u(value)))
        slope = share + value * share * (1.0 - share) * (1.0 + value * value * (3.0 * CUBIC)) * SLOPE
        gradient = tl.load(dy + place, mask=inside, other=0.0).to(WIDE) * slope
        total += gradient
        tl.store(dx + place, gradient, mask=inside)
        place += groups * width
    tl.store(sums + first + columns, total, mask=inside)


def _options(x: Tensor) -> tuple[dict[str, Any], int]:
    """Options of both kernels, and into how many blocks a row is cut."""
    block = block_of(x.shape[-1], LARGEST_BLOCK)
    return {"WIDE": wide_dtype(x), "BLOCK": block, "num_warps": WARPS}, triton.cdiv(x.shape[-1], block)


def _value(x: Tensor, bias: Tensor) -> Tensor:
    width, y = x.shape[-1], torch.empty_like(x)
    options, blocks = _options(x)
    _forward[(x.numel() // width, blocks)](x, bias, y, width, **options)
    return y


class _BiasedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        ctx.options, blocks = _options(x)
        ctx.sizes = x.numel() // width, width, blocks
        ctx.save_for_backward(x, bias)
        return _value(x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        rows, width, blocks = ctx.sizes
        groups = min(rows, triton.cdiv(programs_of(x.device, PROGRAMS), blocks))
        dx = torch.empty_like(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        sums_Gw = torch.empty(groups, width, dtype=dtype, device=x.device)
        _backward[(groups, blocks)](dy.contiguous(), x, bias, dx, sums_Gw, rows, width, **ctx.options)
        return dx, sums_Gw.sum(dim=0).to(bias.dtype)


def biased_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """tanh-GELU of x + bias, differentiable.

    Args:
        x: [..., w] of any dtype; computed in float32, or float64 for such x.
        bias: [w].

    Returns:
        [..., w] of the dtype of x.
    """
    result: Tensor = _BiasedGelu.apply(x, bias)
    return result


@torch.no_grad()
def gelu_again(x: Tensor, bias: Tensor) -> Tensor:
    """Recompute `biased_gelu`, without gradient tracking, for a backward pass that did not keep it.

    Args:
        x: x of the first computation.
        bias: bias of the first computation.

    Returns:
        [..., w], equal bit for bit.
    """
    return _value(x.contiguous(), bias)
