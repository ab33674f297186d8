"""Duo on a laptop: about 3M body parameters; examples/quickstart.sh makes its data."""

from megatron_dlm.objectives.duo import DuoConfig
from megatron_dlm.training.recipes import tiny_run
from megatron_dlm.training.run_config import RunConfig


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return tiny_run(DuoConfig(), num_steps=320)
