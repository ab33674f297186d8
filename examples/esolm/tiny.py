"""Eso-LM on a laptop: about 3M body parameters; examples/quickstart.sh makes its data."""

from megatron_dlm.objectives.esolm import EsoLMConfig
from megatron_dlm.training.recipes import tiny_run
from megatron_dlm.training.run_config import RunConfig


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return tiny_run(EsoLMConfig(), num_steps=320)
