"""Transformer Engine's FP8 recipes on machines without it: operands are rounded to FP8 values, products not.

What a linear's three products read is quantised as there (activation, weight and output gradient; for block
recipes once along each product's inner dimension) and multiplied in float32. So losses and gradients have
FP8's error on any machine, and nothing of its speed. Delayed scaling takes its maxima once a step over all
microbatches and ranks, so that no layout changes a bit of a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from megatron_dlm.models.precision.fp8 import Fp8Config

ACTIVATION, WEIGHT, GRADIENT = range(3)
"""Columns of a linear's maxima."""
BLOCK = 128
MX_BLOCK = 32


def rounded(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """The FP8 values that stand for `x`.

    Args:
        x: float32.
        dtype: torch's FP8 type.
        scale: float32, broadcast against x; finite and positive.

    Returns:
        float32 of x's shape: x * scale, cut to the type's range and rounded, over scale.
    """
    largest = torch.finfo(dtype).max
    return (x * scale).clamp(-largest, largest).to(dtype).float() / scale


def scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that takes `amax` to the type's largest number; 1 where it is 0 or not finite."""
    scale = torch.finfo(dtype).max / amax
    return torch.where(torch.isfinite(scale) & torch.isfinite(amax), scale, 1.0)


def power_of_two_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest power of two that is no more than `scale_for`."""
    return torch.exp2(torch.floor(torch.log2(scale_for(amax, dtype))))


def round_blocks(x: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """`rounded` with a power of two as scale for each block of a matrix.

    Args:
        x: float32 [m, n].
        dtype: torch's FP8 type.
        rows: rows per block.
        columns: columns per block; blocks at the edges may be smaller.

    Returns:
        float32 [m, n].
    """
    m, n = x.shape
    padded = F.pad(x, (0, -n % columns, 0, -m % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scale = power_of_two_scale(blocks.abs().amax(dim=(1, 3), keepdim=True), dtype)
    return rounded(blocks, dtype, scale).flatten(2, 3).flatten(0, 1)[:m, :n]


@dataclass(frozen=True)
class Quantiser:
    """Quantises one operand of a linear, a matrix whose inner dimension is its last."""

    config: Fp8Config
    operand: int
    scale: Tensor | None
    """Scale of delayed scaling; None: the scale is taken from the tensor itself."""

    @property
    def dtype(self) -> torch.dtype:
        """The operand's FP8 type."""
        coarse = self.operand == GRADIENT and self.config.format == "hybrid"
        return torch.float8_e5m2 if coarse else torch.float8_e4m3fn

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [m, n] from [m, n], whose products are summed over n."""
        x = x.float()
        if self.scale is not None:
            return rounded(x, self.dtype, self.scale)
        if self.config.recipe == "tensorwise":
            return rounded(x, self.dtype, scale_for(x.abs().amax(), self.dtype))
        if self.config.recipe == "mxfp8":
            return round_blocks(x, self.dtype, 1, MX_BLOCK)
        return round_blocks(x, self.dtype, BLOCK if self.operand == WEIGHT else 1, BLOCK)


class _Product(torch.autograd.Function):
    """x @ weight^T and its two gradients, each of rounded operands."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, quantisers: tuple[Quantiser, ...], maxima: Tensor | None
    ) -> Tensor:
        ctx.quantisers, ctx.maxima = quantisers, maxima
        ctx.save_for_backward(x, weight)
        x_MK = x.flatten(0, -2)
        if maxima is not None:
            _note(maxima, ACTIVATION, x)
            _note(maxima, WEIGHT, weight)
        out_MN = quantisers[ACTIVATION](x_MK) @ quantisers[WEIGHT](weight).t()
        return out_MN.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_grad = ctx.quantisers
        if ctx.maxima is not None:
            _note(ctx.maxima, GRADIENT, grad)
        grad_MN, x_MK = grad.flatten(0, -2), x.flatten(0, -2)
        dx_MK = of_grad(grad_MN) @ of_weight(weight.t()).t()
        dweight_NK = of_grad(grad_MN.t()) @ of_x(x_MK.t()).t()
        return dx_MK.to(x.dtype).view_as(x), dweight_NK.to(weight.dtype), None, None


def _note(maxima: Tensor, operand: int, x: Tensor) -> None:
    maxima[operand] = torch.maximum(maxima[operand], x.detach().abs().amax().float())


class EmulatedLinear(nn.Module):
    """Put before megatron-core's parallel linears as a base class: their products in emulated FP8."""

    amax_history: Tensor
    """float32 [amax_history_len, 3] of delayed scaling, newest first; empty for the others."""
    maxima: Tensor
    """float32 [3] of the step at work."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp8: Fp8Config | None = kwargs["config"].emulated_fp8
        if self._is_delayed:
            self.register_buffer("amax_history", torch.zeros(self.fp8.amax_history_len, 3))
            self.register_buffer("maxima", torch.zeros(3), persistent=False)

    @property
    def _is_delayed(self) -> bool:
        return self.fp8 is not None and self.fp8.recipe == "delayed"

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        if self._is_delayed:
            # Whatever the parameters' dtype.
            self.amax_history, self.maxima = self.amax_history.float(), self.maxima.float()
        return self

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **unused: Any,
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        out: Tensor
        if self.fp8 is None:
            out = F.linear(input, weight)
        else:
            # Evaluation leaves no trace in the maxima.
            maxima = self.maxima if self._is_delayed and self.training else None
            out = _Product.apply(input, weight, self._quantisers(self.fp8), maxima)
        return out if bias is None else out + bias

    def _quantisers(self, fp8: Fp8Config) -> tuple[Quantiser, ...]:
        if not self._is_delayed:
            return tuple(Quantiser(fp8, operand, None) for operand in range(3))
        history = self.amax_history
        amax = history.amax(dim=0) if fp8.amax_compute_algo == "max" else history[0]
        quantisers = []
        for operand in range(3):
            dtype = Quantiser(fp8, operand, None).dtype
            quantisers.append(Quantiser(fp8, operand, scale_for(amax[operand], dtype) / 2.0**fp8.margin))
        return tuple(quantisers)


class EmulatedColumnParallelLinear(EmulatedLinear, ColumnParallelLinear):
    """megatron-core's column-parallel linear with emulated FP8 products."""


class EmulatedRowParallelLinear(EmulatedLinear, RowParallelLinear):
    """megatron-core's row-parallel linear with emulated FP8 products."""


def keep_bf16_layers(layer: nn.Module, config: Any, layer_number: int) -> None:
    """Turn FP8 emulation off in a layer that the configuration keeps in bf16 (first and last layers).

    Args:
        layer: newly built layer; changed in place.
        config: megatron-core's configuration.
        layer_number: number of the layer in the whole model, from 1.
    """
    if is_first_last_bf16_layer(config, layer_number - 1):
        for linear in _emulated(layer):
            linear.fp8 = None


def follow_maxima(model: nn.Module, group: dist.ProcessGroup) -> None:
    """End a step of delayed scaling: the step's maxima enter the histories. All ranks of `group` call it.

    Args:
        model: this process's stage.
        group: process group of all ranks that hold shards or replicas of the same layers.
    """
    linears = [linear for linear in _emulated(model) if linear._is_delayed]
    if not linears:
        return
    maxima = torch.stack([linear.maxima for linear in linears])
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    for linear, newest in zip(linears, maxima, strict=True):
        # A step that is skipped leaves no infinity behind.
        newest = torch.where(torch.isfinite(newest), newest, linear.amax_history[0])
        linear.amax_history = torch.cat([newest[None], linear.amax_history[:-1]])
        linear.maxima.zero_()


def _emulated(model: nn.Module) -> Iterator[EmulatedLinear]:
    return (module for module in model.modules() if isinstance(module, EmulatedLinear))
