"""MDLM on a laptop: about 3M body parameters; examples/quickstart.sh makes its data."""

from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.presets import tiny_run


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return tiny_run(MDLMConfig(), num_steps=320)
