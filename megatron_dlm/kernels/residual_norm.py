"""Gated residual addition and modulated LayerNorm of an adaLN layer, fused into one Triton kernel per pass.

A branch plus its bias, times the sample's gate, is added to the residual stream; the bias-free LayerNorm n of
the sum is modulated by the sample's shift and scale: y = n * weight * (1 + scale) + shift. Either half may be
left out: a layer begins with a norm alone and ends with a gate alone. The stream is read and written once. In
the backward pass the gradients with respect to the stream and to y are added here; each program handles some
positions of one sample and accumulates the sums from which the gradients of gate, shift, scale, weight and
bias are computed.

Shape legend, as in megatron-core: s sequence, b batch, d hidden size; G groups of positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dlm.kernels.block_sizes import programs_of, tiles_of, wide_dtype
from megatron_dlm.kernels.residual_norm_kernels import add_and_norm, add_and_norm_gradient

LARGEST_WIDTH = 1 << 15
FORWARD_COLUMNS, BACKWARD_COLUMNS = 512, 256
"""Columns of the main tile for each warp of a program."""
WARPS_OF_A_PROCESSOR = 16
"""Warps of all programs that a multiprocessor runs at once in the backward pass, as registers allow: some
programs load while others reduce."""


def _warps(main: int, columns: int) -> int:
    return max(4, min(16, main // columns))


def _tiles(width: int) -> dict[str, int]:
    if width > LARGEST_WIDTH:
        raise ValueError(f"residual norm over {width} channels; the kernel takes {LARGEST_WIDTH}")
    main, tail = tiles_of(width)
    return {"MAIN": main, "TAIL": tail}


def _rows(vector_bd: Tensor) -> Tensor:
    """Rows of a sample each that may lie apart, as parts of a wider tensor do."""
    return vector_bd if vector_bd.stride(-1) == 1 else vector_bd.contiguous()


def _launch_forward(
    stream: Tensor,
    added: tuple[Tensor, Tensor, Tensor | None] | None,
    normed: tuple[Tensor, Tensor, Tensor] | None,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream behind the branch, y, means and inverse deviations of rows; what is left out is empty."""
    length, batch, width = stream.shape
    tiles = _tiles(width)
    wide = torch.promote_types(stream.dtype, torch.float32)
    out = stream if added is None else torch.empty_like(stream)
    y = stream.new_empty(stream.shape if normed is not None else (0,), dtype=dtype)
    means, deviations = (
        stream.new_empty(length * batch if normed is not None else 0, dtype=wide) for _ in range(2)
    )
    # Arguments that a kernel does not look at still have to be tensors.
    branch, gate, bias = added or (stream, stream, None)
    weight, shift, scale = normed or (stream, stream, stream)
    add_and_norm[(length * batch,)](
        stream,
        branch,
        gate,
        stream if bias is None else bias,
        weight,
        shift,
        scale,
        out,
        y,
        means,
        deviations,
        batch,
        width,
        gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        epsilon,
        BRANCH=added is not None,
        BIASED=bias is not None,
        NORM=normed is not None,
        WIDE=wide_dtype(stream),
        num_warps=_warps(tiles["MAIN"], FORWARD_COLUMNS),
        **tiles,
    )
    return out, y, means, deviations


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        bias: Tensor | None,
        weight: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        epsilon: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        stream = stream.contiguous()
        added = normed = None
        if branch is not None and gate is not None:
            branch, gate = branch.contiguous(), _rows(gate)
            added = branch, gate, bias
        if weight is not None and shift is not None and scale is not None:
            shift, scale = _rows(shift), _rows(scale)
            normed = weight, shift, scale
        out, y, means, deviations = _launch_forward(stream, added, normed, epsilon, dtype)
        ctx.save_for_backward(
            out if normed is not None else None, branch, gate, bias, weight, scale, means, deviations
        )
        ctx.set_materialize_grads(False)
        if normed is None:
            ctx.mark_non_differentiable(y)
        return (out if added is not None else out.view_as(out)), y

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, branch, gate, bias, weight, scale, means, deviations = ctx.saved_tensors
        has_norm, has_branch = dy is not None and x is not None, branch is not None
        if not has_norm and not has_branch:
            return dout, *([None] * 8)
        like: Any = x if x is not None else dout
        length, batch, width = like.shape
        dout = None if dout is None else dout.contiguous()
        tiles = _tiles(width)
        warps = _warps(tiles["MAIN"], BACKWARD_COLUMNS)
        programs = programs_of(like.device, WARPS_OF_A_PROCESSOR // warps)
        groups = min(length, -(-programs // batch))
        dx = torch.empty_like(like) if has_norm else dout
        dbranch = torch.empty_like(branch) if has_branch else None
        sums_Gb4d = like.new_empty(
            groups, batch, 4, width, dtype=torch.promote_types(like.dtype, torch.float32)
        )
        add_and_norm_gradient[(batch, groups)](
            like if dout is None else dout,
            dy.contiguous() if dy is not None else like,
            like if x is None else x,
            like if branch is None else branch,
            like if gate is None else gate,
            like if bias is None else bias,
            like if weight is None else weight,
            like if scale is None else scale,
            means,
            deviations,
            dx,
            like if dbranch is None else dbranch,
            sums_Gb4d,
            length,
            batch,
            width,
            0 if gate is None else gate.stride(0),
            0 if scale is None else scale.stride(0),
            BRANCH=has_branch,
            BIASED=has_branch and bias is not None,
            NORM=has_norm,
            STREAM=dout is not None,
            WIDE=wide_dtype(like),
            num_warps=warps,
            **tiles,
        )
        dgate = dbias = dweight = dshift = dscale = None
        if has_branch:
            dgate = sums_Gb4d[:, :, 0].sum(dim=0).to(gate.dtype)
        if has_branch and bias is not None:
            dbias = (sums_Gb4d[:, :, 1].sum(dim=0) * gate).sum(dim=0).to(bias.dtype)
        if has_norm:
            dshift, along = sums_Gb4d[:, :, 2:].sum(dim=0).unbind(dim=1)
            dweight = (along * (1.0 + scale)).sum(dim=0).to(weight.dtype)
            dscale = (along * weight.to(along.dtype)).to(scale.dtype)
            dshift = dshift.to(scale.dtype)
        return dx, dbranch, dgate, dbias, dweight, dshift, dscale, None, None


def modulated_norm(
    stream: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """LayerNorm(stream) * weight * (1 + scale) + shift, differentiable.

    Args:
        stream: float32 or float64 [s, b, d].
        weight: [d].
        shift: [b, d]; rows may be strided.
        scale: [b, d]; rows may be strided.
        epsilon: added to the variance.
        dtype: dtype of y; computation is in float32, or in float64 for a float64 stream.

    Returns:
        The stream, to be used by later operations so that the kernel adds its gradients; and y [s, b, d].
    """
    found: tuple[Tensor, Tensor] = _ResidualNorm.apply(
        stream, None, None, None, weight, shift, scale, epsilon, dtype
    )
    return found


def gated_residual(stream: Tensor, gate: Tensor, branch: Tensor, bias: Tensor | None) -> Tensor:
    """Stream + gate * (branch + bias), differentiable.

    Args:
        stream: float32 or float64 [s, b, d].
        gate: [b, d], of the stream's dtype; its rows may lie apart.
        branch: [s, b, d] of any dtype; its gradient has the same.
        bias: [d], or None.

    Returns:
        [s, b, d] of the stream's dtype.
    """
    added: Tensor = _ResidualNorm.apply(stream, branch, gate, bias, None, None, None, 0.0, branch.dtype)[0]
    return added


def gated_residual_norm(
    stream: Tensor,
    gate: Tensor,
    branch: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`gated_residual` without a bias, then `modulated_norm`, in one pass each way.

    Args:
        stream: float32 or float64 [s, b, d].
        gate: [b, d], of the stream's dtype; rows of this and of the next ones may lie apart.
        branch: [s, b, d] of any dtype; its gradient has the same.
        weight: [d].
        shift: [b, d].
        scale: [b, d].
        epsilon: added to the variance.
        dtype: of y.

    Returns:
        The stream behind the branch, and y; both [s, b, d].
    """
    found: tuple[Tensor, Tensor] = _ResidualNorm.apply(
        stream, branch, gate, None, weight, shift, scale, epsilon, dtype
    )
    return found


@torch.no_grad()
def normed_again(
    stream: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, epsilon: float, dtype: torch.dtype
) -> Tensor:
    """Recompute y of `modulated_norm`, without gradient tracking, for a backward pass that did not keep it.

    Args:
        stream: stream of the first computation.
        weight: weight of the first computation.
        shift: shift of the first computation.
        scale: scale of the first computation.
        epsilon: epsilon of the first computation.
        dtype: dtype of the first computation.

    Returns:
        y [s, b, d], equal bit for bit.
    """
    normed = weight, _rows(shift), _rows(scale)
    return _launch_forward(stream, None, normed, epsilon, dtype)[1]
