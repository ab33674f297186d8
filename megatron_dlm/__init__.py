"""Megatron-style distributed training of discrete diffusion language models.

Importing this package starts nothing and imports neither torch nor megatron-core.
"""

__version__ = "0.1.0"
