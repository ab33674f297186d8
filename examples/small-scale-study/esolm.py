"""The small-scale study's Eso-LM."""

from dataclasses import replace
from pathlib import Path

from megatron_dlm.families.esolm.objective import EsoLMConfig
from megatron_dlm.run.config import RunConfig, load_recipe


def recipe() -> RunConfig:
    """The base run with this family."""
    return replace(load_recipe(Path(__file__).with_name("base.py")), objective=EsoLMConfig())
