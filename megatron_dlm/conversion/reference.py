"""Lightning checkpoints of the paper's code (github.com/s-sahoo/scaling-dllms): weights in, weights out.

Such a file is a pickle that also holds the run's configuration objects. The unpickler here finds what tensors
are made of; objects of known libraries become placeholders that do nothing, any other name is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.checkpointing.safe_metadata import force_weights_only
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.models.config import ROTARY_BASE, ModelConfig
from megatron_dlm.models.weight_mapping import public_shapes
from megatron_dlm.platform.files import beside, check_new, commit

PREFIX = "backbone."
ROTARY_BUFFER = "rotary_emb.inv_freq"
"""The reference keeps the rotary frequencies as a buffer, which a strict load asks for."""
INERT_PACKAGES = (
    *("collections", "copyreg", "dataloader", "lightning", "lightning_fabric", "numpy", "omegaconf"),
    *("pathlib", "pytorch_lightning", "tokenizers", "torch", "torchmetrics", "transformers", "typing"),
)
INERT_BUILTINS = (
    *("bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "set", "str", "tuple"),
    # Their names in torch.save's pickle protocol.
    *("long", "unicode"),
)
TENSOR_PARTS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch", "Size"),
}
"""Functions that rebuild tensors from a pickle; torch finds the tensors' storages itself."""


class _Inert:
    """Stands for any object of a configuration; takes everything, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        """Take attributes."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take an entry."""

    def append(self, value: Any) -> None:
        """Take one item."""

    def extend(self, values: Any) -> None:
        """Take items."""


class _Unpickler(pickle.Unpickler):
    """Finds tensors and placeholders and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in TENSOR_PARTS:
            return super().find_class(module, name)
        builtin = module in ("builtins", "__builtin__") and name in INERT_BUILTINS
        if builtin or module.split(".")[0] in INERT_PACKAGES:
            return _Inert
        raise InputError(f"its pickle names {module}.{name}; refused")


def _unpickle(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_PICKLE = SimpleNamespace(__name__="restricted_pickle", Unpickler=_Unpickler, load=_unpickle)
"""Given to torch.load in place of the module pickle."""


def read_reference_checkpoint(path: Path, model: ModelConfig, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """The full tensors of a reference checkpoint by public name.

    Args:
        path: Lightning `.ckpt` file.
        model: model configuration that gives the expected shapes.
        vocabulary: vocabulary whose size the checkpoint must match.

    Returns:
        Every tensor of `public_shapes`, in the file's dtype.

    Raises:
        InputError: the file is not a checkpoint, its pickle names an unknown class, or tensors are missing,
            unknown or of another shape.
    """
    state = load_tensors(path).get("state_dict")
    if not isinstance(state, dict):
        raise _complaint(path, "has no state_dict")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point()):
            raise _complaint(path, f"state_dict entry {name!r} is not a floating-point tensor")
    found = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    frequencies = found.pop(ROTARY_BUFFER, None)
    if frequencies is not None and not is_rotary_buffer(frequencies, model):
        raise _complaint(path, f"{ROTARY_BUFFER} is not that of head dimension {model.head_dim}")
    expected = public_shapes(model, vocabulary.size)
    for name in sorted(expected.keys() ^ found.keys()):
        what = "lacks" if name in expected else "has an unknown tensor"
        raise _complaint(path, f"{what} {PREFIX}{name}")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise _complaint(path, f"{PREFIX}{name} has shape {tuple(found[name].shape)}, the model {shape}")
    return found


def load_tensors(path: Path) -> dict[str, Any]:
    """What torch.save wrote, with tensors as they are and all other objects as placeholders.

    Args:
        path: the file.

    Returns:
        Its dictionary; tensors are read when they are used.

    Raises:
        InputError: the file is no such archive, or its pickle names an unknown class.
    """
    if not path.is_file():
        raise _complaint(path, "no such file")
    _refuse_programs(path)
    try:
        # torch's own restricted unpickler refuses the configuration objects that every real file holds.
        with force_weights_only(False):
            loaded = torch.load(
                path, map_location="cpu", weights_only=False, pickle_module=_PICKLE, mmap=True
            )
    except InputError as error:
        raise _complaint(path, f"{error}") from error
    except Exception as error:  # a damaged pickle raises almost anything
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _complaint(path, f"unreadable: {message}") from error
    if not isinstance(loaded, dict):
        raise _complaint(path, f"holds a {type(loaded).__name__}, not a checkpoint")
    return loaded


def _complaint(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}")


def _refuse_programs(path: Path) -> None:
    """Let plain torch.save archives through; torch hands TorchScript, a program, to another loader."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = {Path(name).name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise _complaint(path, f"unreadable: {error}") from error
    if "constants.pkl" in records:
        raise _complaint(path, "is a TorchScript program, not a checkpoint; refused")
    if "data.pkl" not in records:
        raise _complaint(path, "unreadable: holds no data.pkl")


def write_reference_checkpoint(state: dict[str, Tensor], path: Path, model: ModelConfig, step: int) -> None:
    """Write full tensors as the reference's code loads them (`finetune_path`).

    Args:
        state: full tensors by public name.
        path: file to make; it appears only when complete.
        model: shape of the tensors.
        step: optimizer steps the weights have seen.

    Raises:
        InputError: `path` exists.
    """
    check_new(path)
    named = {f"{PREFIX}{name}": tensor for name, tensor in state.items()}
    named[PREFIX + ROTARY_BUFFER] = _rotary_frequencies(model)
    with beside(path) as temporary:
        torch.save({"state_dict": named, "global_step": step, "epoch": 0, "ema": None}, temporary)
        commit(temporary, path)


def is_rotary_buffer(frequencies: Tensor, model: ModelConfig) -> bool:
    """Whether a buffer holds the rotary frequencies of a model.

    Args:
        frequencies: the buffer, of any shape.
        model: shape of the model.

    Returns:
        True if it is [head dimension / 2] and equal but for rounding.
    """
    expected = _rotary_frequencies(model)
    return frequencies.shape == expected.shape and torch.allclose(frequencies.float(), expected)


def _rotary_frequencies(model: ModelConfig) -> Tensor:
    return 1.0 / ROTARY_BASE ** (torch.arange(0, model.head_dim, 2).float() / model.head_dim)
