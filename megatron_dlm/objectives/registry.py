"""The families by name; the only place that lists them."""

from __future__ import annotations

from megatron_dlm.objectives.ar import ARConfig
from megatron_dlm.objectives.base import ObjectiveConfig
from megatron_dlm.objectives.block_diffusion import BlockDiffusionConfig
from megatron_dlm.objectives.duo import DuoConfig
from megatron_dlm.objectives.esolm import EsoLMConfig
from megatron_dlm.objectives.mdlm import MDLMConfig

_FAMILIES = (ARConfig, MDLMConfig, DuoConfig, EsoLMConfig, BlockDiffusionConfig)
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {config.name: config for config in _FAMILIES}
