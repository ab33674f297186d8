"""A branch with its bias, times a sample's gate, added to the residual stream: one pass each way, in Triton.

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
    stream, gate, branch, bias, out, batch, width,
    BIASED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row % batch
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(branch + row * width + columns, mask=inside, other=0.0).to(WIDE)
    if BIASED:
        value += tl.load(bias + columns, mask=inside, other=0.0).to(WIDE)
    opened = tl.load(gate + sample * width + columns, mask=inside, other=0.0).to(WIDE)
    before = tl.load(stream + row * width + columns, mask=inside, other=0.0).to(WIDE)
    tl.store(out + row * width + columns, before + opened * value, mask=inside)


@triton.jit
def _backward(
    dout, gate, branch, bias, dbranch, sums, length, batch, width,
    BIASED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = tl.num_programs(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    opened = tl.load(gate + sample * width + columns, mask=inside, other=0.0).to(WIDE)
    gate_sum = tl.zeros([BLOCK], WIDE)
    plain_sum = tl.zeros([BLOCK], WIDE)
    offset = tl.zeros([BLOCK], WIDE)
    if BIASED:
        offset = tl.load(bias + columns, mask=inside, other=0.0).to(WIDE)
    for position in range(group, length, groups):
        row = position * batch + sample
        gradient = tl.load(dout + row * width + columns, mask=inside, other=0.0).to(WIDE)
        value = tl.load(branch + row * width + columns, mask=inside, other=0.0).to(WIDE)
        gate_sum += gradient * (value + offset)
        plain_sum += gradient
        tl.store(dbranch + row * width + columns, gradient * opened, mask=inside)
    place = (group * batch + sample) * 2 * width
    tl.store(sums + place + columns, gate_sum, mask=inside)
    tl.store(sums + place + width + columns, plain_sum, mask=inside)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, gate: Tensor, branch: Tensor, bias: Tensor | None) -> Tensor:
        stream, gate, branch = stream.contiguous(), gate.contiguous(), branch.contiguous()
        length, batch, width = stream.shape
        if width > LARGEST_WIDTH:
            raise ValueError(f"gated residual of {width} channels; the kernel takes {LARGEST_WIDTH}")
        ctx.options = {"BIASED": bias is not None, "WIDE": wide_dtype(stream)}
        ctx.options |= {"BLOCK": block_of(width, LARGEST_WIDTH), "num_warps": 8}
        out = torch.empty_like(stream)
        offset = gate if bias is None else bias
        _forward[(length * batch,)](stream, gate, branch, offset, out, batch, width, **ctx.options)
        ctx.save_for_backward(gate, branch, bias)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gate, branch, bias = ctx.saved_tensors
        length, batch, width = branch.shape
        dout = dout.contiguous()
        groups = min(length, -(-PROGRAMS // batch))
        dbranch = torch.empty_like(branch)
        sums_Gb2d = dout.new_empty(groups, batch, 2, width)
        offset = gate if bias is None else bias
        _backward[(batch, groups)](
            dout, gate, branch, offset, dbranch, sums_Gb2d, length, batch, width, **ctx.options
        )
        dgate, plain = sums_Gb2d.sum(dim=0).unbind(dim=1)
        dbias = None if bias is None else (plain * gate).sum(dim=0).to(bias.dtype)
        return dout, dgate.to(gate.dtype), dbranch, dbias


def gated_residual(stream: Tensor, gate: Tensor, branch: Tensor, bias: Tensor | None) -> Tensor:
    """Stream + gate * (branch + bias), differentiable.

    Args:
        stream: float32 or float64 [s, b, d].
        gate: [b, d], of the stream's dtype.
        branch: [s, b, d] of any dtype; its gradient has the same.
        bias: [d], or None.

    Returns:
        [s, b, d] of the stream's dtype.
    """
    result: Tensor = _GatedResidual.apply(stream, gate, branch, bias)
    return result
