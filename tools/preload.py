"""What the fork server imports before it forks."""

import importlib
from contextlib import suppress

import torch

from megatron_dlm.platform import cpu

torch.set_num_threads(1)
cpu.install()

for name in (
    "megatron_dlm.checkpointing.manager",
    "megatron_dlm.training.train",
    "megatron_dlm.training.session",
    # What is imported when a model is built.
    "megatron.core.models.backends",
    "megatron.core.transformer.dot_product_attention",
):
    importlib.import_module(name)
# Of extras, which a GPU host may lack.
for name in ("matplotlib.figure", "megatron_dlm.conversion.hugging_face_model.modeling_megatron_dlm"):
    with suppress(ImportError):
        importlib.import_module(name)
