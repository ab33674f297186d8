"""Cheap activations made again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_dlm.models.denoiser_config import DenoiserConfig


def recomputes_cheap_ones(config: DenoiserConfig) -> bool:
    """Whether activations that cost no matrix product are recomputed in the backward pass."""
    # Transformer Engine's FP8 linears keep an FP8 copy of what they read, not the value itself.
    return config.recompute_granularity == "selective" and torch.is_grad_enabled() and not config.fp8


@contextmanager
def not_keeping(value: Tensor, config: DenoiserConfig, again: Callable[[], Tensor]) -> Iterator[None]:
    """Within this context, operations that save `value` for backward recompute it there instead.

    Args:
        value: activation that is read within the context and not needed afterwards.
        config: selects whether anything is recomputed.
        again: recomputes `value`, bit for bit.

    Yields:
        Nothing.
    """
    if not recomputes_cheap_ones(config):
        yield
        return
    memory, count, dtype = value.data_ptr(), value.numel(), value.dtype

    def pack(saved: Tensor) -> Tensor | torch.Size:
        is_value = saved.data_ptr() == memory and saved.numel() == count and saved.dtype == dtype
        # A transpose of it would not come back as such.
        return saved.shape if is_value and saved.is_contiguous() else saved

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return again().view(kept) if isinstance(kept, torch.Size) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class Recomputable:
    """A function's output that one linear reads; it can be freed and recomputed for the backward pass."""

    def __init__(self, config: DenoiserConfig, function: Callable[..., Tensor], *inputs: Any) -> None:
        wanted = recomputes_cheap_ones(config)
        # Not the default, False: that makes megatron-core 0.16.1 look for transformer-engine.
        self._checkpoint = CheckpointWithoutOutput(fp8=None) if wanted else None
        self.value: Tensor = (
            function(*inputs) if self._checkpoint is None else self._checkpoint.checkpoint(function, *inputs)
        )

    def release(self, result: Tensor) -> None:
        """Drop the value until the gradient of `result`, made from it, arrives."""
        if self._checkpoint is not None:
            self._checkpoint.discard_output_and_register_recompute(result)


class RecomputingMLP(MLP):
    """megatron-core's MLP, which can drop the activation function's value, the widest tensor of a layer."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, d] before the bias, and the bias [d]."""
        wide, wide_bias = self.linear_fc1(hidden_states)
        if not self.config.recomputes_gelu:
            whole: tuple[Tensor, Tensor] = self.linear_fc2(self._activate(wide, wide_bias))
            return whole
        if not self.config.fused_kernels:
            activated = Recomputable(self.config, self._activate, wide, wide_bias)
            output, bias = self.linear_fc2(activated.value)
            activated.release(output)
            return output, bias
        from megatron_dlm.kernels.biased_gelu import gelu_again

        value = self._activate(wide, wide_bias)
        with not_keeping(value, self.config, partial(gelu_again, wide.detach(), wide_bias.detach())):
            output, bias = self.linear_fc2(value)
        return output, bias

    def _activate(self, wide: Tensor, bias: Tensor) -> Tensor:
        if self.config.fused_kernels:
            from megatron_dlm.kernels.biased_gelu import biased_gelu

            return biased_gelu(wide, bias)
        activated: Tensor = self.activation_func(wide + bias)
        return activated
