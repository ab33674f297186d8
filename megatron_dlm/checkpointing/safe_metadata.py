"""Reads torch's checkpoint metadata, a pickle, with an allow-list, before torch reads it without one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from megatron_dlm.interfaces import InputError

METADATA = ".metadata"
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


class _Unpickler(pickle.Unpickler):
    """Finds the classes of checkpoint metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise InputError(f"names {module}.{name}, which checkpoint metadata never does")
        return super().find_class(module, name)


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
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        names = {info.relative_path for info in metadata.storage_data.values()}
    except InputError as error:
        raise InputError(f"checkpoint: {path}: {error}") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(f"checkpoint: {path}: unreadable: {error}") from error
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".distcp"):
            raise InputError(f"checkpoint: {path}: points at {name!r}, not at a .distcp file beside it")
