"""MDLM 113M of the IsoFLOP grid at 6e18 FLOPs, trained with the bound in place of the low-variance loss."""

from dataclasses import replace
from pathlib import Path

from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.presets import isoflop_run


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    run = isoflop_run("113M", MDLMConfig(loss="elbo"), budget_flops=6e18)
    return replace(run, directory=Path("runs/mdlm-elbo-113m"))
