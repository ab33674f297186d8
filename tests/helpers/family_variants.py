"""Families in all the ways in which they are evaluated."""

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.families.duo.objective import DuoConfig
from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.families.mdlm.objective import MDLMConfig

FAMILIES = {
    "ar": ARConfig(),
    "mdlm": MDLMConfig(),
    "duo": DuoConfig(),
    "esolm": EsoLMConfig(),
    "esolm-two-parts": EsoLMConfig(alpha_0=0.5, batch_split=0.5),
    "esolm-sequential": EsoLMConfig(alpha_0=0.0, batch_split=0.0),
    "block-diffusion": BlockDiffusionConfig(block_size=4),
}
