"""The small-scale study's AR, whose loss is exact."""

from dataclasses import replace
from pathlib import Path

from megatron_dlm.families.ar.objective import ARConfig
from megatron_dlm.run.config import RunConfig, load_recipe


def recipe() -> RunConfig:
    """The base run with this family."""
    return replace(load_recipe(Path(__file__).with_name("base.py")), objective=ARConfig())
