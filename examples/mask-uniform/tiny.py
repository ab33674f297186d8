"""Mask and uniform noise on a laptop: about 3M body parameters; examples/quickstart.sh makes its data."""

from megatron_dlm.families.mask_uniform.objective import MaskUniformConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.presets import tiny_run


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return tiny_run(MaskUniformConfig(), num_steps=320)
