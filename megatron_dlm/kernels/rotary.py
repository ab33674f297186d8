"""Rotary embedding with positions of each sample's own, in Triton.

Shape legend, as in megatron-core: s sequence, b batch, n heads of this rank, h channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dlm.kernels.block_sizes import wide_dtype


@triton.jit
def _rotate(
    x, table, out, sequence_stride, batch_stride, head_stride, batch, table_batch, heads, half,
    sign, WIDE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position, sample = row // batch, row % batch
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (channel < half)
    angles = table + (position * table_batch + sample % table_batch) * 2 * half
    cos = tl.load(angles + channel, mask=channel < half, other=0.0).to(WIDE)
    sin = tl.load(angles + half + channel, mask=channel < half, other=0.0).to(WIDE) * sign
    source = x + position * sequence_stride + sample * batch_stride + head * head_stride + channel
    first = tl.load(source, mask=inside, other=0.0).to(WIDE)
    second = tl.load(source + half, mask=inside, other=0.0).to(WIDE)
    target = out + (row * heads + head) * 2 * half + channel
    tl.store(target, first * cos - second * sin, mask=inside)
    tl.store(target + half, second * cos + first * sin, mask=inside)


def _rotated(x: Tensor, table: Tensor, sign: float) -> Tensor:
    length, batch, heads, channels = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    out = x.new_empty(x.shape)
    half = channels // 2
    _rotate[(length * batch,)](
        x,
        table,
        out,
        *x.stride()[:3],
        batch,
        table.shape[1],
        heads,
        half,
        sign,
        WIDE=wide_dtype(x),
        HEADS=triton.next_power_of_2(heads),
        HALF=triton.next_power_of_2(half),
    )
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _rotated(x, table, 1.0)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return _rotated(dout, table, -1.0), None


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (channel, channel + h / 2) of each head, differentiable.

    Args:
        x: [s, b, n, h] of any dtype and strides; computed in float32, or float64 for such x.
        table: contiguous [s, b or 1, 1, h], cosines in its first half, sines in its second.

    Returns:
        Contiguous [s, b, n, h].
    """
    result: Tensor = _Rotary.apply(x, table)
    return result
