"""Block diffusion on a laptop, blocks of 16 tokens: about 3M body parameters."""

from megatron_dlm.families.block_diffusion.objective import BlockDiffusionConfig
from megatron_dlm.run.config import RunConfig
from megatron_dlm.run.presets import tiny_run


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return tiny_run(BlockDiffusionConfig(block_size=16), num_steps=320)
