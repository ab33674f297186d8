"""The small-scale study's MDLM, trained with the weights of the ELBO, by which all are evaluated."""

from dataclasses import replace
from pathlib import Path

from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.run.config import RunConfig, load_recipe


def recipe() -> RunConfig:
    """The base run with this family."""
    return replace(load_recipe(Path(__file__).with_name("base.py")), objective=MDLMConfig(loss="elbo"))
