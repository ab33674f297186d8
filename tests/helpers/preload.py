"""What the fork server imports before it forks."""

import importlib
from contextlib import suppress

import torch

from megatron_dlm.platform import cpu

torch.set_num_threads(1)
cpu.install()

for name in ("checkpointing.manager", "training.hooks", "training.session"):
    importlib.import_module(f"megatron_dlm.{name}")
# Of extras, which a GPU host may lack.
for name in ("matplotlib.figure", "megatron_dlm.conversion.hugging_face_model.modeling_megatron_dlm"):
    with suppress(ImportError):
        importlib.import_module(name)
