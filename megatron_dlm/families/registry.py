"""The families by name; the only place that lists them."""

from __future__ import annotations

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig

_FAMILIES = (ARConfig, MDLMConfig, DuoConfig, EsoLMConfig, BlockDiffusionConfig)
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {config.name: config for config in _FAMILIES}
