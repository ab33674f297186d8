"""Duo 113M of the IsoFLOP grid at 6e18 FLOPs (17,383 steps), on 8 GPUs."""

from megatron_dlm.objectives.duo import DuoConfig
from megatron_dlm.training.recipes import isoflop_run
from megatron_dlm.training.run_config import RunConfig


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return isoflop_run("113M", DuoConfig(), budget_flops=6e18)
