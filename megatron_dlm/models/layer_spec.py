"""megatron-core layer specs: which module stands where in an adaLN layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules

from megatron_dlm.interfaces import AttentionPattern
from megatron_dlm.models.adaln_layer import AdaLNLayerSubmodules, AdaLNTransformerLayer
from megatron_dlm.models.attention import RotarySelfAttention, SdpaAttention
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.denoiser_config import DenoiserConfig
from megatron_dlm.models.heads_linear import HeadsLinear
from megatron_dlm.models.precision.fp8_emulation import (
    EmulatedColumnParallelLinear,
    EmulatedRowParallelLinear,
)
from megatron_dlm.models.recompute import RecomputingMLP

_MASK_TYPES = {
    AttentionPattern.CAUSAL: AttnMaskType.causal,
    AttentionPattern.BIDIRECTIONAL: AttnMaskType.no_mask,
}


class QkvLinear(HeadsLinear, ColumnParallelLinear):
    """Query, key and value of this rank's heads."""


class AttentionOutputLinear(HeadsLinear, RowParallelLinear):
    """Output projection of attention, from this rank's heads."""


class EmulatedQkvLinear(HeadsLinear, EmulatedColumnParallelLinear):
    """Query, key and value of this rank's heads, in emulated FP8."""


class EmulatedAttentionOutputLinear(HeadsLinear, EmulatedRowParallelLinear):
    """Output projection of attention, from this rank's heads, in emulated FP8."""


@dataclass(frozen=True)
class _Parts:
    """Module classes for the linears and the attention core of a layer."""

    qkv: Any
    core: Any
    output: Any
    up: Any
    down: Any


def _parts(config: DenoiserConfig) -> _Parts:
    if config.transformer_impl == "transformer_engine":
        from megatron_dlm.models.precision import transformer_engine as te

        return _Parts(
            te.QkvLinear, te.FusedAttention, te.AttentionOutputLinear, te.ColumnLinear, te.RowLinear
        )
    if config.emulated_fp8 is not None:
        return _Parts(
            EmulatedQkvLinear,
            SdpaAttention,
            EmulatedAttentionOutputLinear,
            EmulatedColumnParallelLinear,
            EmulatedRowParallelLinear,
        )
    return _Parts(QkvLinear, SdpaAttention, AttentionOutputLinear, ColumnParallelLinear, RowParallelLinear)


def layer_spec(model: ModelConfig, config: DenoiserConfig, attention: AttentionPattern) -> ModuleSpec:
    """The adaLN layer on parallel linears and an attention core.

    Args:
        model: shape.
        config: tells whose linears and attention.
        attention: pattern of every layer.

    Returns:
        Spec for `TransformerBlock`.
    """
    parts = _parts(config)
    self_attention = ModuleSpec(
        module=RotarySelfAttention,
        params={"attn_mask_type": _MASK_TYPES[attention]},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.qkv, core_attention=parts.core, linear_proj=parts.output
        ),
    )
    mlp = ModuleSpec(
        module=RecomputingMLP,
        params={"ffn_hidden_size": model.ffn_hidden_size},
        submodules=MLPSubmodules(linear_fc1=parts.up, linear_fc2=parts.down),
    )
    return ModuleSpec(
        module=AdaLNTransformerLayer,
        params={"conditioning_size": model.conditioning_size},
        submodules=AdaLNLayerSubmodules(self_attention=self_attention, mlp=mlp),
    )
