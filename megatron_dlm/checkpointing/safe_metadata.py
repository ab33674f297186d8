"""Reads torch's checkpoint metadata, a pickle, with an allow-list, before torch reads it without one."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_dlm.interfaces import InputError

METADATA = ".metadata"
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable by which torch.load takes `weights_only` whatever its caller says."""
LARGEST_BYTES = 64 << 20
"""Largest metadata file that is read; metadata take some hundred bytes a tensor and process."""
_PLAN = "torch.distributed.checkpoint.planner"
_META = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16")),
    *(("torch", name) for name in ("int64", "int32", "int16", "uint8", "bool")),
    *((_PLAN, name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    *(
        (_META, name)
        for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")
    ),
    *((_META, name) for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata")),
    (_META, "_MEM_FORMAT_ENCODING"),
}


def _enum_member(enumeration: Any, name: Any) -> Enum:
    """The only use of `getattr` in metadata: Python 3.11 before 3.11.4 writes members of enums so."""
    if not (isinstance(enumeration, EnumMeta) and name in enumeration.__members__):
        raise InputError("uses getattr for something else than a member of an enum")
    return enumeration.__members__[name]


class _Unpickler(pickle.Unpickler):
    """Finds the classes of checkpoint metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) not in _ALLOWED:
            raise InputError(f"names {module}.{name}, which checkpoint metadata never does")
        return super().find_class(module, name)


@contextmanager
def force_weights_only(on: bool) -> Iterator[None]:
    """Let torch unpickle tensors and plain containers only, whatever the caller of torch.load says.

    Args:
        on: False lifts such an order of the user's environment for as long as the context lasts.
    """
    previous = os.environ.pop(FORCE_WEIGHTS_ONLY, None)
    if on:
        os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        os.environ.pop(FORCE_WEIGHTS_ONLY, None)
        if previous is not None:
            os.environ[FORCE_WEIGHTS_ONLY] = previous


def check_metadata(checkpoint: Path) -> None:
    """Refuse metadata that would run code or point outside the checkpoint.

    A manifest of checksums guards against damage, not against a hostile author, who writes both.

    Args:
        checkpoint: directory with a `.metadata` file.

    Raises:
        InputError: a class that is not metadata, a file name with a path in it, or an unreadable file.
    """
    path = checkpoint / METADATA
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise InputError(f"{path.stat().st_size:,} bytes, more than {LARGEST_BYTES:,}")
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        for index, info in metadata.storage_data.items():
            _check_place(checkpoint, index.fqn, info)
        for name, tensor in metadata.state_dict_metadata.items():
            if hasattr(tensor, "chunks"):
                _check_chunks(name, tensor, metadata.storage_data)
    except InputError as error:
        raise InputError(f"checkpoint: {path}: {error}") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(f"checkpoint: {path}: unreadable: {error}") from error


def _check_place(checkpoint: Path, name: str, info: Any) -> None:
    """The bytes of a tensor's chunk lie in a regular file of the checkpoint."""
    file = checkpoint / info.relative_path
    if Path(info.relative_path).name != info.relative_path or file.suffix != ".distcp" or file.is_symlink():
        raise InputError(f"points at {info.relative_path!r}, not at a .distcp file beside it")
    size = file.stat().st_size if file.is_file() else 0
    if info.offset < 0 or info.length < 0 or info.offset + info.length > size:
        raise InputError(
            f"{name}: bytes {info.offset} to {info.offset + info.length} of {file}, which has {size}"
        )


def _check_chunks(name: str, tensor: Any, storage: dict[Any, Any]) -> None:
    """Check that chunks add up to their tensor and that enough bytes are stored for each chunk."""
    total = 0
    for chunk in tensor.chunks:
        count = math.prod(chunk.sizes)
        total += count
        info = storage.get(MetadataIndex(name, chunk.offsets))
        if info is None or count * tensor.properties.dtype.itemsize > info.length:
            raise InputError(f"{name}: a chunk of {count:,} elements, and not the bytes for it")
    if total != math.prod(tensor.size):
        raise InputError(f"{name}: size {tuple(tensor.size)}, and chunks of {total:,} elements")
