"""Block diffusion on a laptop, blocks of 16 tokens: about 3M body parameters."""

from megatron_dlm.objectives.block_diffusion import BlockDiffusionConfig
from megatron_dlm.training.recipes import tiny_run
from megatron_dlm.training.run_config import RunConfig


def recipe() -> RunConfig:
    """The run; override any field on the command line."""
    return tiny_run(BlockDiffusionConfig(block_size=16), num_steps=320)
