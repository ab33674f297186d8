"""Folders of published models: the paper's tensor names in safetensors or torch.save files, with a tokenizer.

What is assumed of them, since the published files were not at hand: tensors have the names of the paper's
code (github.com/s-sahoo/scaling-dllms), with or without its prefixes; the files are named as transformers
names them; and the tokenizer lies beside them, as tokenizer.json. Family and shape come from a recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_dlm.conversion.from_hugging_face import INDEX, SINGLE_FILE, WeightFolder
from megatron_dlm.conversion.reference import PREFIX, ROTARY_BUFFER, is_rotary_buffer, load_tensors
from megatron_dlm.interfaces import Vocabulary
from megatron_dlm.models.config import ModelConfig

BIN_INDEX, BIN_FILE = "pytorch_model.bin.index.json", "pytorch_model.bin"
PREFIXES = ("module.", "model.", PREFIX)
"""What wrappers put before the names of the paper's code, outermost first."""
MASK_FIELDS = ("mask_token_id", "mask_index", "mask_id")
"""Names under which a config.json may hold the id of the mask token."""


class PublishedFolder(WeightFolder):
    """A folder that was made neither by `megatron-dlm export` nor from it."""

    def weights(self, model: ModelConfig, vocabulary: Vocabulary) -> Mapping[str, Tensor]:
        """The tensors by public name.

        Args:
            model: model configuration that gives the expected shapes.
            vocabulary: vocabulary of the model.

        Returns:
            Tensors; those of safetensors files are read when asked for.

        Raises:
            InputError: tensors are missing, unknown, of another shape or not of floating-point numbers, or
                config.json has another mask token.
        """
        for name in MASK_FIELDS:
            found = self.config.get(name)
            if found is not None and found != vocabulary.mask_token_id:
                raise self._complaint(
                    f"config.json: {name} {found!r} is not {vocabulary.mask_token_id}, the tokenizer's mask "
                    "token"
                )
        if (self.path / INDEX).exists() or (self.path / SINGLE_FILE).exists():
            files = self._weight_files()
            stored = self._by_public_name(files)
            if (buffer := stored.pop(ROTARY_BUFFER, None)) is not None:
                with safe_open(files[buffer], framework="pt") as tensors:
                    self._refuse_other_rotary(tensors.get_tensor(buffer), model)
            return self._checked(files, stored, model, vocabulary)
        return self._of_bin_files(model, vocabulary)

    def _of_bin_files(self, model: ModelConfig, vocabulary: Vocabulary) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in self._bin_files():
            for name, tensor in load_tensors(file).items():
                if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                    raise self._complaint(f"{file.name}: {name} is not a floating-point tensor")
                tensors[str(name)] = tensor
        stored = self._by_public_name(tensors)
        found = {public: tensors[name] for public, name in stored.items()}
        if (buffer := found.pop(ROTARY_BUFFER, None)) is not None:
            self._refuse_other_rotary(buffer, model)
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        self._refuse_misfits(shapes, stored, model, vocabulary)
        return found

    def _bin_files(self) -> list[Path]:
        if (self.path / BIN_INDEX).exists():
            weights = self._json(BIN_INDEX).get("weight_map")
            if not isinstance(weights, dict):
                raise self._complaint(f"{BIN_INDEX}: has no weight_map")
            return sorted({self._inside(name) for name in weights.values()})
        if not (self.path / BIN_FILE).exists():
            raise self._complaint(f"has none of {SINGLE_FILE}, {INDEX}, {BIN_FILE} and {BIN_INDEX}")
        return [self._inside(BIN_FILE)]

    def _by_public_name(self, names: Iterable[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in sorted(names):
            if (other := found.setdefault(_public(name), name)) != name:
                raise self._complaint(f"tensors {name} and {other} are the same one")
        return found

    def _refuse_other_rotary(self, buffer: torch.Tensor, model: ModelConfig) -> None:
        if not is_rotary_buffer(buffer, model):
            raise self._complaint(f"{ROTARY_BUFFER} is not that of head dimension {model.head_dim}")


def _public(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
