"""The denoiser's shape, and the choices of how it is computed. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.parallel_config import ParallelConfig

Precision = Literal["fp32", "bf16", "fp8"]
"""Precision of parameters and matrix products; fp8 has bf16 parameters and FP8 products in the layers."""
TransformerImpl = Literal["local", "transformer_engine"]
"""Implementation of linears and attention. local: megatron-core's and PyTorch's; or Transformer Engine's."""
Recompute = Literal["none", "norms", "selective", "full"]
"""Activations to recompute in the backward pass. none; norms: modulated norms; selective: modulated norms and
GELU, which cost no matrix product; full: whole layers."""
LAYER_NORM_EPSILON = 1e-5
ROTARY_BASE = 10000.0
FREQUENCY_CHANNELS = 256
"""Channels of the sinusoid of the noise level, which the time embedder reads."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the diffusion transformer (DiT); --model.size takes a published one."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Attention heads; must divide hidden_size."""
    ffn_hidden_size: int
    """Width of the MLP; 4 x hidden_size in the paper."""
    conditioning_size: int = 128
    """Width of the time embedding that feeds adaLN."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "ffn_hidden_size",
            "conditioning_size",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}: {getattr(self, name)} is below 1")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"model.num_attention_heads: {self.num_attention_heads} does not divide "
                f"model.hidden_size {self.hidden_size}"
            )
        if self.head_dim % 2:
            raise InputError(f"model.hidden_size: head dimension {self.head_dim} is odd; rotary needs pairs")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def padded_heads(self, tensor_size: int) -> int:
        """Heads after padding to a multiple of the tensor parallel size; padded ones stay zero."""
        return -(-self.num_attention_heads // tensor_size) * tensor_size

    def check_parallel(self, parallel: ParallelConfig) -> None:
        """Refuse layouts this shape cannot take.

        Args:
            parallel: sizes of the axes.

        Raises:
            InputError: tensor parallelism does not divide the MLP, or there are more stages than layers.
        """
        tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        if self.ffn_hidden_size % tensor:
            raise InputError(
                f"parallel.tensor_model_parallel_size: {tensor} does not divide "
                f"model.ffn_hidden_size {self.ffn_hidden_size}"
            )
        chunks = parallel.virtual_pipeline_model_parallel_size
        if self.num_layers < stages:
            raise InputError(
                f"parallel.pipeline_model_parallel_size: {stages} exceeds model.num_layers {self.num_layers}"
            )
        if self.num_layers < stages * chunks:
            raise InputError(
                f"parallel.virtual_pipeline_model_parallel_size: {chunks} chunks on {stages} stages exceed "
                f"model.num_layers {self.num_layers}"
            )

    def stage_layers(self, stages: int) -> list[int]:
        """Layers of each pipeline stage, nearly equal; the last stages, towards the head, have fewer."""
        each, extra = divmod(self.num_layers, stages)
        return [each + (stage < extra) for stage in range(stages)]
