"""Bias-free LayerNorm and modulation by a sample's shift and scale in one pass each way, in Triton.

With n = (x - mean) / deviation, y = n * weight * (1 + scale) + shift. In the backward pass a program takes
some positions of one sample and keeps the two sums that the parameters' gradients follow from: of dy and of
dy * n.
Shape legend, as in megatron-core: s sequence, b batch, d hidden size; G groups of positions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dlm.kernels.launch import PROGRAMS, block_of, wide_dtype

LARGEST_WIDTH = 1 << 15


@triton.jit
def _forward(
    x, weight, shift, scale, y, means, deviations, batch, width, epsilon,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row % batch
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(WIDE)
    mean = tl.sum(value, axis=0) / width
    centred = tl.where(inside, value - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + epsilon)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(WIDE)
    gain *= 1.0 + tl.load(scale + sample * width + columns, mask=inside, other=0.0).to(WIDE)
    moved = centred * inverse * gain + tl.load(shift + sample * width + columns, mask=inside, other=0.0).to(
        WIDE
    )
    tl.store(y + row * width + columns, moved, mask=inside)
    tl.store(means + row, mean)
    tl.store(deviations + row, inverse)


@triton.jit
def _backward(
    dy, x, weight, scale, means, deviations, dx, sums, length, batch, width,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = tl.num_programs(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(WIDE)
    gain *= 1.0 + tl.load(scale + sample * width + columns, mask=inside, other=0.0).to(WIDE)
    shift_sum = tl.zeros([BLOCK], WIDE)
    scale_sum = tl.zeros([BLOCK], WIDE)
    for position in range(group, length, groups):
        row = position * batch + sample
        gradient = tl.load(dy + row * width + columns, mask=inside, other=0.0).to(WIDE)
        value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(WIDE)
        inverse = tl.load(deviations + row)
        normed = tl.where(inside, (value - tl.load(means + row)) * inverse, 0.0)
        shift_sum += gradient
        scale_sum += gradient * normed
        inner = gradient * gain
        along = tl.sum(inner * normed, axis=0) / width
        moved = inverse * (inner - tl.sum(inner, axis=0) / width - normed * along)
        tl.store(dx + row * width + columns, moved, mask=inside)
    place = (group * batch + sample) * 2 * width
    tl.store(sums + place + columns, shift_sum, mask=inside)
    tl.store(sums + place + width + columns, scale_sum, mask=inside)


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, epsilon: float, dtype: torch.dtype
    ) -> Tensor:
        x, shift, scale = x.contiguous(), shift.contiguous(), scale.contiguous()
        length, batch, width = x.shape
        if width > LARGEST_WIDTH:
            raise ValueError(f"modulated norm over {width} channels; the kernel takes {LARGEST_WIDTH}")
        y = x.new_empty(x.shape, dtype=dtype)
        ctx.options = {"WIDE": wide_dtype(x), "BLOCK": block_of(width, LARGEST_WIDTH), "num_warps": 8}
        means, deviations = (
            x.new_empty(length * batch, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2)
        )
        _forward[(length * batch,)](
            x, weight, shift, scale, y, means, deviations, batch, width, epsilon, **ctx.options
        )
        ctx.save_for_backward(x, weight, scale, means, deviations)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, means, deviations = ctx.saved_tensors
        length, batch, width = x.shape
        groups = min(length, -(-PROGRAMS // batch))
        dx = torch.empty_like(x)
        sums_Gb2d = means.new_empty(groups, batch, 2, width)
        _backward[(batch, groups)](
            dy.contiguous(),
            x,
            weight,
            scale,
            means,
            deviations,
            dx,
            sums_Gb2d,
            length,
            batch,
            width,
            **ctx.options,
        )
        dshift, along = sums_Gb2d.sum(dim=0).unbind(dim=1)
        dweight = (along * (1.0 + scale)).sum(dim=0).to(weight.dtype)
        dscale = along * weight.to(along.dtype)
        return dx, dweight, dshift.to(scale.dtype), dscale.to(scale.dtype), None, None


def modulated_norm(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, epsilon: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm(x) * weight * (1 + scale) + shift, differentiable.

    Args:
        x: [s, b, d].
        weight: [d].
        shift: [b, d].
        scale: [b, d].
        epsilon: added to the variance.
        dtype: of the result; all is computed in float32, or float64 for such x.

    Returns:
        [s, b, d].
    """
    result: Tensor = _ModulatedNorm.apply(x, weight, shift, scale, epsilon, dtype)
    return result
