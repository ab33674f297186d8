"""Versions of NVIDIA's packages that fit each other; a pair that does not is refused before it computes."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from megatron_dlm import __version__
from megatron_dlm.interfaces import InputError

logger = logging.getLogger(__name__)
MEGATRON_CORE = "0.16.1"
"""The version that has run on GPUs."""
NEWER_MEGATRON_CORE = ">=0.19.2,<0.20"
"""Versions that have run on CPUs only."""
TRANSFORMER_ENGINE = ">=2.9,<2.12"
"""megatron-core 0.16.1 calls what later ones have renamed or removed."""


def is_newer_megatron_core(found: str | None) -> bool:
    """Whether a version of megatron-core is one that has run on CPUs only.

    Args:
        found: the version; None: none.

    Returns:
        True if it is among NEWER_MEGATRON_CORE.
    """
    return found is not None and SpecifierSet(NEWER_MEGATRON_CORE).contains(found, prereleases=True)


def check_megatron_core(*, on_gpu: bool = False) -> None:
    """Refuse a megatron-core whose internals this package does not know.

    Args:
        on_gpu: warn of a version that has run on CPUs only.

    Raises:
        InputError: it is another version, or not there.
    """
    found = installed_version("megatron-core")
    if is_newer_megatron_core(found):
        if on_gpu:
            logger.warning(f"megatron-core: {found} has run on CPUs only; on GPUs {MEGATRON_CORE} has")
    elif found != MEGATRON_CORE:
        raise InputError(
            f"megatron-core: {found or 'not installed'}; this version of megatron-dlm needs {MEGATRON_CORE} "
            f"or, on CPUs, {NEWER_MEGATRON_CORE}"
        )


DECIDING_PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "apex", "numpy")
_broken: list[str] = []
"""Error messages of the import of Transformer Engine, if it is installed but cannot be imported."""


def import_transformer_engine() -> None:
    """Import Transformer Engine before megatron-core does; where that fails, it looks absent from then on.

    megatron-core expects an ImportError at most, and a missing library is a RuntimeError there.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        _broken.append(str(error).strip().split("\n")[0].rstrip("."))
        for module in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[module]
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed, even if it cannot be imported."""
    return bool(_broken) or importlib.util.find_spec("transformer_engine") is not None


def check_transformer_engine() -> None:
    """Refuse a Transformer Engine that megatron-core's wrappers do not fit, or that has no PyTorch part.

    Raises:
        InputError: its version is outside `TRANSFORMER_ENGINE`, or it could not be imported.
    """
    found = installed_version("transformer-engine")
    wanted = f"megatron-core {MEGATRON_CORE} needs {TRANSFORMER_ENGINE}; or --training.transformer-impl local"
    if found is not None and not SpecifierSet(TRANSFORMER_ENGINE).contains(found, prereleases=True):
        raise InputError(f"transformer-engine: {found} does not fit: {wanted}")
    if _broken:
        raise InputError(
            f"transformer-engine: {found or 'unknown version'} cannot be imported ({_broken[0]}): its "
            "PyTorch part comes with pip install --no-build-isolation "
            f"'transformer-engine[pytorch]{TRANSFORMER_ENGINE}'; or --training.transformer-impl local"
        )


def deciding_versions() -> dict[str, str | None]:
    """Versions of what decides the numbers that a run computes, by name; None: it is not there."""
    import torch

    nccl = None if torch.version.cuda is None else ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "python": platform.python_version(),
        "megatron-dlm": __version__,
        **{name: installed_version(name) for name in DECIDING_PACKAGES},
        "nccl": nccl,
    }


def installed_version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed.

    Args:
        package: its name on the package index.

    Returns:
        The version.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None
