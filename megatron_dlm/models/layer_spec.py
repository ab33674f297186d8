"""megatron-core layer specs: which module stands where in an adaLN layer."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules

from megatron_dlm.interfaces import AttentionPattern
from megatron_dlm.models.adaln_layer import AdaLNLayerSubmodules, AdaLNTransformerLayer
from megatron_dlm.models.attention import RotarySelfAttention, SdpaAttention
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.recompute import RecomputingMLP

_MASK_TYPES = {
    AttentionPattern.CAUSAL: AttnMaskType.causal,
    AttentionPattern.BIDIRECTIONAL: AttnMaskType.no_mask,
}


class QkvLinear(ColumnParallelLinear):
    """Column-parallel linear without bias; heads padded for tensor parallelism may differ on loading."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"bias": False}))

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> ShardedStateDict:
        """As the base class, with padded heads cut or filled with zeros on loading."""
        return allow_padding(super().sharded_state_dict(*args, **kwargs))


class AttentionOutputLinear(RowParallelLinear):
    """Row-parallel linear without bias; heads padded for tensor parallelism may differ on loading."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"bias": False}))

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> ShardedStateDict:
        """As the base class, with padded heads cut or filled with zeros on loading."""
        return allow_padding(super().sharded_state_dict(*args, **kwargs))


def allow_padding(state_dict: ShardedStateDict) -> ShardedStateDict:
    """Mark tensors whose global shape carries padding that depends on the tensor parallel size."""
    for tensor in state_dict.values():
        if isinstance(tensor, ShardedTensor):
            tensor.allow_shape_mismatch = True
    return state_dict


def layer_spec(model: ModelConfig, attention: AttentionPattern) -> ModuleSpec:
    """The adaLN layer on megatron-core's parallel linears and PyTorch's attention.

    Args:
        model: shape.
        attention: pattern of every layer.

    Returns:
        Spec for `TransformerBlock`.
    """
    self_attention = ModuleSpec(
        module=RotarySelfAttention,
        params={"attn_mask_type": _MASK_TYPES[attention]},
        submodules=SelfAttentionSubmodules(
            linear_qkv=QkvLinear, core_attention=SdpaAttention, linear_proj=AttentionOutputLinear
        ),
    )
    mlp = ModuleSpec(
        module=RecomputingMLP,
        params={"ffn_hidden_size": model.ffn_hidden_size},
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(
        module=AdaLNTransformerLayer,
        params={"conditioning_size": model.conditioning_size},
        submodules=AdaLNLayerSubmodules(self_attention=self_attention, mlp=mlp),
    )
