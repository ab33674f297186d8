"""Versions of NVIDIA's packages that fit each other; a pair that does not is refused before it computes."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from megatron_dlm.interfaces import InputError

MEGATRON_CORE = "0.16.1"
TRANSFORMER_ENGINE = ">=2.9,<2.12"
"""megatron-core 0.16.1 calls what later ones have renamed or removed."""


def check_megatron_core() -> None:
    """Refuse a megatron-core whose internals this package does not know.

    Raises:
        InputError: it is another version, or not there.
    """
    found = _installed("megatron-core")
    if found != MEGATRON_CORE:
        raise InputError(
            f"megatron-core: {found or 'not installed'}; this version of megatron-dlm needs {MEGATRON_CORE}"
        )


def check_transformer_engine() -> None:
    """Refuse a Transformer Engine that megatron-core's wrappers do not fit, or that has no PyTorch part.

    Raises:
        InputError: its version is outside `TRANSFORMER_ENGINE`, or it cannot be imported.
    """
    found = _installed("transformer-engine")
    wanted = f"megatron-core {MEGATRON_CORE} needs {TRANSFORMER_ENGINE}; or --training.transformer-impl local"
    if found is not None and not SpecifierSet(TRANSFORMER_ENGINE).contains(found, prereleases=True):
        raise InputError(f"transformer-engine: {found} does not fit: {wanted}")
    try:
        importlib.import_module("transformer_engine.pytorch")
    # A missing library is a RuntimeError, an AssertionError or an ImportError there.
    except Exception as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(
            f"transformer-engine: {found or 'unknown version'} cannot be imported ({reason}): its PyTorch "
            "part comes with pip install --no-build-isolation "
            f"'transformer-engine[pytorch]{TRANSFORMER_ENGINE}'; or --training.transformer-impl local"
        ) from error


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
