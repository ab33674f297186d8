"""MDLM 1.7B, phase 1: 500,000 steps of 2.1M tokens, on 16 nodes x 8 GPUs."""

from megatron_dlm.objectives.mdlm import MDLMConfig
from megatron_dlm.training.recipes import phase1_run
from megatron_dlm.training.run_config import RunConfig


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return phase1_run(MDLMConfig(ssl_ratio=0.01))
