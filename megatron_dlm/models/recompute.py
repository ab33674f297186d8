"""Cheap activations made again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class Recomputable:
    """A function's value that one linear layer reads; it can be dropped and made again for the gradient."""

    def __init__(self, config: TransformerConfig, function: Callable[..., Tensor], *inputs: Any) -> None:
        # Transformer Engine's FP8 linears keep an FP8 copy of what they read, not the value itself.
        wanted = config.recompute_granularity == "selective" and torch.is_grad_enabled() and not config.fp8
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
        activated = Recomputable(self.config, self._activate, wide, wide_bias)
        output, bias = self.linear_fc2(activated.value)
        activated.release(output)
        return output, bias

    def _activate(self, wide: Tensor, bias: Tensor) -> Tensor:
        if self.config.fused_kernels:
            from megatron_dlm.kernels.biased_gelu import biased_gelu

            return biased_gelu(wide, bias)
        activated: Tensor = self.activation_func(wide + bias)
        return activated
