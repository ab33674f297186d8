"""Whole weights of a checkpoint by public name, some at a time, in one process without any group.

A checkpoint of any layout holds each tensor as boxes; what is read is the part that is no padding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load

from megatron_dlm.checkpointing.layout import verify
from megatron_dlm.checkpointing.safe_metadata import check_metadata, tensors_only
from megatron_dlm.checkpointing.tensor_chunks import LoadPlanner, TensorChunks, main_weight_key
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.weight_mapping import from_stored, public_shapes, stored_place


class FullWeights:
    """Reads tensors of one checkpoint."""

    def __init__(self, directory: Path, model: ModelConfig, vocabulary_size: int) -> None:
        """Check the checkpoint and open it.

        Args:
            directory: a step-NNNNNNNN directory.
            model: its shape.
            vocabulary_size: without padding.

        Raises:
            InputError: incomplete, damaged or hostile.
        """
        verify(directory)
        check_metadata(directory)
        self._reader = FileSystemReader(directory)
        self._stored = self._reader.read_metadata().state_dict_metadata
        self._num_heads = model.num_attention_heads
        self.shapes = public_shapes(model, vocabulary_size)
        """Shape of every tensor by public name."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as exactly as the checkpoint has them: of a bf16 run the optimizer's main weights.

        Args:
            names: public.

        Returns:
            float32 by name.
        """
        tensors: dict[str, Tensor] = {}
        wanted: dict[str, TensorChunks] = {}
        for name in names:
            key, layer = stored_place(name)
            main = main_weight_key(key)
            shape = self.shapes[name]
            tensor = torch.empty(shape if layer is None else (1, *shape), dtype=torch.float32)
            pieces = wanted.setdefault(main if main in self._stored else key, TensorChunks())
            pieces.add((0,) * tensor.dim() if layer is None else (layer, *(0 for _ in shape)), tensor)
            tensors[name] = tensor if layer is None else tensor[0]
        with warnings.catch_warnings():
            # Of there being no process group.
            warnings.simplefilter("ignore", UserWarning)
            with tensors_only():
                load(wanted, storage_reader=self._reader, planner=LoadPlanner())
        return {name: from_stored(name, tensor, self._num_heads) for name, tensor in tensors.items()}
