"""What the fork server of `megatron-dlm scaling run` imports before it forks: each run starts at once.

A fork server takes names of modules and imports them: this module is imported for that effect alone.
"""

from __future__ import annotations

from importlib import import_module

MODULES = (
    "megatron_dlm.cli.train",
    "megatron_dlm.checkpointing.manager",
    "megatron_dlm.training.train",
    "megatron_dlm.training.session",
    "megatron_dlm.training.hooks.evaluation",
    "megatron_dlm.training.hooks.generation",
    "torch.utils.tensorboard",
    # What is imported when a model is built.
    "megatron.core.models.backends",
    "megatron.core.transformer.dot_product_attention",
)


def preload() -> None:
    """Import what training needs.

    On a machine with GPUs only PyTorch: what megatron-core finds when it is imported depends on the device,
    which a run chooses, and CUDA cannot be used before a fork.
    """
    import torch

    from megatron_dlm.platform import cpu
    from megatron_dlm.platform.gpu import gpu_files
    from megatron_dlm.platform.parallel import silence_megatron

    # A fork has none of its parent's threads.
    torch.set_num_threads(1)
    if gpu_files():
        return
    silence_megatron()
    cpu.install()
    for name in MODULES:
        import_module(name)


preload()
