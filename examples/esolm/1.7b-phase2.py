"""Eso-LM 1.7B, phase 2: 350,000 steps from phase 1's weights, on 16 nodes x 8 GPUs."""

from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.presets import phase2_run


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return phase2_run(EsoLMConfig(ssl_ratio=0.01))
