"""The families by name; the only place that lists them."""

from __future__ import annotations

from megatron_dlm.objectives.ar import ARConfig
from megatron_dlm.objectives.base import ObjectiveConfig
from megatron_dlm.objectives.mdlm import MDLMConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {config.name: config for config in (ARConfig, MDLMConfig)}
