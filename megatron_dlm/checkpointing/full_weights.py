"""Reads full weights of a checkpoint by public name, some at a time, in one process without process groups.

A checkpoint of any layout holds each tensor as boxes; only the part without padding is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load

from megatron_dlm.checkpointing.layout import verify
from megatron_dlm.checkpointing.safe_metadata import check_metadata, force_weights_only
from megatron_dlm.checkpointing.tensor_chunks import LoadPlanner, TensorChunks, weight_key
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.weight_mapping import from_stored, public_shapes, stored_place


class FullWeights:
    """Reads tensors of one checkpoint."""

    def __init__(
        self, directory: Path, model: ModelConfig, vocabulary_size: int, *, averaged: bool = False
    ) -> None:
        """Check the checkpoint and open it.

        Args:
            directory: a step-NNNNNNNN directory.
            model: shape of the checkpoint's model.
            vocabulary_size: number of token ids, without padding.
            averaged: whether to read the moving averages of the weights.

        Raises:
            InputError: the checkpoint is incomplete, damaged or hostile.
        """
        verify(directory)
        check_metadata(directory)
        self._reader = FileSystemReader(directory)
        self._stored = self._reader.read_metadata().state_dict_metadata
        self._averaged = averaged
        self._num_heads = model.num_attention_heads
        self.shapes = public_shapes(model, vocabulary_size)
        """Shape of every tensor by public name."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors at the checkpoint's highest precision: for a bf16 run the optimizer's main weights.

        Args:
            names: public names of the tensors.

        Returns:
            float32 tensors by public name.
        """
        tensors: dict[str, Tensor] = {}
        wanted: dict[str, TensorChunks] = {}
        for name in names:
            key, layer = stored_place(name)
            shape = self.shapes[name]
            tensor = torch.empty(shape if layer is None else (1, *shape), dtype=torch.float32)
            pieces = wanted.setdefault(weight_key(key, self._stored, averaged=self._averaged), TensorChunks())
            pieces.add((0,) * tensor.dim() if layer is None else (layer, *(0 for _ in shape)), tensor)
            tensors[name] = tensor if layer is None else tensor[0]
        with warnings.catch_warnings():
            # Of there being no process group.
            warnings.simplefilter("ignore", UserWarning)
            with force_weights_only(True):
                load(wanted, storage_reader=self._reader, planner=LoadPlanner())
        return {name: from_stored(name, tensor, self._num_heads) for name, tensor in tensors.items()}
