"""What the fork server imports before it forks."""

import torch

from megatron_dlm.platform import cpu

torch.set_num_threads(1)
cpu.install()

import megatron_dlm.checkpointing.manager  # noqa: E402
import megatron_dlm.training.hooks  # noqa: E402
import megatron_dlm.training.session  # noqa: E402, F401
