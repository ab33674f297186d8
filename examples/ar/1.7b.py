"""AR 1.7B, phase 1: 500,000 steps of 2.1M tokens, on 16 nodes x 8 GPUs."""

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.presets import phase1_run


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return phase1_run(ARConfig())
