"""The adaLN transformer layer and the final adaLN layer (DiT, arXiv:2212.09748; arXiv:2602.15014).

Shape legend, as in megatron-core: s sequence, b batch, d hidden size, c conditioning size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor, nn

from megatron_dlm.models.config import LAYER_NORM_EPSILON
from megatron_dlm.models.denoiser_config import DenoiserConfig
from megatron_dlm.models.precision.fp8_emulation import keep_bf16_layers
from megatron_dlm.models.recompute import Recomputable, not_keeping
from megatron_dlm.models.time_embedding import Fp32Linear


@dataclass
class AdaLNLayerSubmodules:
    """Specs of the submodules of an adaLN layer."""

    self_attention: ModuleSpec
    mlp: ModuleSpec


class ModulatedNorm(nn.Module):
    """Bias-free LayerNorm in float32, then x * (1 + scale) + shift."""

    def __init__(self, config: DenoiserConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.dtype = dtype

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """[s, b, d] of the layer's dtype from x [s, b, d] and shift, scale [b, d]."""
        normed = F.layer_norm(x.float(), (x.shape[-1],), self.weight.float(), None, LAYER_NORM_EPSILON)
        return torch.addcmul(shift, normed, 1.0 + scale).to(self.dtype)


class FusedModulatedNorm(ModulatedNorm):
    """`ModulatedNorm` and the gated branch that is added to the stream before it, if any, as one kernel."""

    def forward(  # type: ignore[override]
        self,
        stream: Tensor,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor | None = None,
        branch: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream + gate * branch, both as in `gated_residual_norm`, and its modulated norm."""
        from megatron_dlm.kernels.residual_norm import gated_residual_norm, modulated_norm

        options = self.weight, shift, scale, LAYER_NORM_EPSILON, self.dtype
        if gate is None or branch is None:
            return modulated_norm(stream, *options)
        return gated_residual_norm(stream, gate, branch, *options)

    def again(self, stream: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Recompute the modulated norm, without gradient tracking."""
        from megatron_dlm.kernels.residual_norm import normed_again

        return normed_again(stream, self.weight, shift, scale, LAYER_NORM_EPSILON, self.dtype)


class AdaLNTransformerLayer(MegatronModule, BaseTransformerLayer):
    """Attention and MLP, each behind a modulated norm and a gate; the residual stream is float32.

    The conditioning vector comes in megatron-core's `context` argument, which recomputation passes on.
    """

    def __init__(
        self,
        config: DenoiserConfig,
        submodules: AdaLNLayerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
        *,
        conditioning_size: int,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number + get_transformer_layer_offset(
            config, vp_stage, pg_collection.pp.rank()
        )
        norm = FusedModulatedNorm if config.fused_kernels else ModulatedNorm
        self.norm1: ModulatedNorm = norm(config, config.params_dtype)
        self.self_attention = build_module(
            submodules.self_attention,
            config=config,
            layer_number=self.layer_number,
            pg_collection=pg_collection,
        )
        self.norm2: ModulatedNorm = norm(config, config.params_dtype)
        self.mlp = build_module(submodules.mlp, config=config, tp_group=pg_collection.tp)
        self.modulation = Fp32Linear(conditioning_size, 6 * config.hidden_size)
        self.replay: Callable[..., Tensor] | None = None
        """`compute` as a recording, from `cuda_graphs.record_layers`; only for training."""
        keep_bf16_layers(self, config, self.layer_number)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        context: Tensor,
        rotary_pos_emb: Tensor,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            hidden_states: float32 [s, b, d].
            attention_mask: replaces the attention core's own pattern, in a form the core accepts; or None.
            context: conditioning vector, float32 [b, c].
            rotary_pos_emb: float32 [s, b or 1, 1, head_dim], from `rotary_table`.
            **unused: inference arguments of megatron-core's block.

        Returns:
            float32 [s, b, d], and `context` for the next layer.
        """
        inputs = [hidden_states, context, rotary_pos_emb]
        if attention_mask is not None:
            inputs.append(attention_mask)
        if self.replay is None or not (self.training and torch.is_grad_enabled()):
            return self.compute(*inputs), context
        self._run_hooks()
        return self.replay(*inputs), context

    def _run_hooks(self) -> None:
        """Run megatron-core's forward pre-hooks (such as parameter gathering), which a graph replay skips."""
        for module in self.modules():
            for hook in module._forward_pre_hooks.values():
                hook(module, ())

    def compute(
        self,
        hidden_states: Tensor,
        context: Tensor,
        rotary_pos_emb: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """float32 [s, b, d] from what `forward` takes."""
        if self.config.fused_kernels:
            return self._compute_fused(hidden_states, context, rotary_pos_emb, attention_mask)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(context).chunk(6, dim=-1)
        normed = Recomputable(self.config, self.norm1, hidden_states, shift1, scale1)
        attended, _ = self.self_attention(normed.value, attention_mask, rotary_pos_emb=rotary_pos_emb)
        normed.release(attended)
        hidden_states = torch.addcmul(hidden_states, gate1, attended.float())
        normed = Recomputable(self.config, self.norm2, hidden_states, shift2, scale2)
        transformed, bias = self.mlp(normed.value)
        normed.release(transformed)
        return torch.addcmul(hidden_states, gate2, (transformed + bias).float())

    def _compute_fused(
        self, stream: Tensor, context: Tensor, rotary_pos_emb: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """`compute` with one kernel each way for all that is between two matrix products."""
        from megatron_dlm.kernels.residual_norm import gated_residual

        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(context).chunk(6, dim=-1)
        norm1, norm2 = cast(FusedModulatedNorm, self.norm1), cast(FusedModulatedNorm, self.norm2)
        stream, normed = norm1(stream, shift1, scale1)
        with not_keeping(normed, self.config, partial(norm1.again, stream.detach(), shift1, scale1)):
            attended, _ = self.self_attention(normed, attention_mask, rotary_pos_emb=rotary_pos_emb)
        stream, normed = norm2(stream, shift2, scale2, gate1, attended)
        with not_keeping(normed, self.config, partial(norm2.again, stream.detach(), shift2, scale2)):
            transformed, bias = self.mlp(normed)
        return gated_residual(stream, gate2, transformed, bias)


class FinalLayer(nn.Module):
    """The modulated norm before the head."""

    def __init__(self, config: DenoiserConfig, conditioning_size: int) -> None:
        super().__init__()
        norm = FusedModulatedNorm if config.fused_kernels else ModulatedNorm
        self.norm = norm(config, torch.float32)
        self.modulation = Fp32Linear(conditioning_size, 2 * config.hidden_size)

    def forward(self, hidden_states: Tensor, c: Tensor) -> Tensor:
        """float32 [s, b, d] from [s, b, d] and c [b, conditioning_size]."""
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        normed = self.norm(hidden_states, shift, scale)
        return normed[1] if isinstance(normed, tuple) else normed
