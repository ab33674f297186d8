"""Eso-LM 113M of the IsoFLOP grid at 6e18 FLOPs (17,383 steps), on 8 GPUs."""

from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.presets import isoflop_run


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return isoflop_run("113M", EsoLMConfig(), budget_flops=6e18)
