"""The only list of families: a family is a folder here and a line below.

A folder holds `objective.py` with the family's configuration (a class derived from `ObjectiveConfig`),
`sampler.py` with a class `Sampler` and `likelihood.py` with a class `Likelihood`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from megatron_dlm.diffusion.likelihood import FamilyLikelihood
from megatron_dlm.families.base import ObjectiveConfig
from megatron_dlm.interfaces import InputError
from megatron_dlm.sampling.family_sampler import FamilySampler

FOLDERS = (
    "ar",
    "mdlm",
    "duo",
    "esolm",
    "block_diffusion",
    "mask_uniform",
)


def _objective_in(folder: str) -> type[ObjectiveConfig]:
    module = import_module(f"{__package__}.{folder}.objective")
    (config,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ObjectiveConfig)
        and value.__module__ == module.__name__
    )
    return config


_OBJECTIVE_IN = {folder: _objective_in(folder) for folder in FOLDERS}
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {config.name: config for config in _OBJECTIVE_IN.values()}
"""Configuration class of each family by name; the name is the folder's, with "-" in place of "_"."""


def folder_of(family: str) -> str:
    """The folder of a family.

    Args:
        family: registered name of the family.

    Returns:
        Name of the family's folder.

    Raises:
        InputError: no family has that name.
    """
    for folder, config in _OBJECTIVE_IN.items():
        if config.name == family:
            return folder
    raise InputError(f"family: {family!r} is not one of {', '.join(OBJECTIVES)}")


def sampler_of(family: str) -> type[FamilySampler]:
    """The sampler class of a family.

    Args:
        family: registered name of the family.

    Returns:
        The family's `Sampler`.

    Raises:
        InputError: the family is unknown or has no sampler.
    """
    sampler: type[FamilySampler] = _part(family, "sampler", "Sampler")
    return sampler


def likelihood_of(family: str) -> type[FamilyLikelihood]:
    """The class that computes the likelihood of a family's exported models.

    Args:
        family: registered name of the family.

    Returns:
        The family's `Likelihood`.

    Raises:
        InputError: the family is unknown or has no likelihood.
    """
    likelihood: type[FamilyLikelihood] = _part(family, "likelihood", "Likelihood")
    return likelihood


def _part(family: str, part: str, name: str) -> Any:
    folder = folder_of(family)
    module = f"{__package__}.{folder}.{part}"
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.rpartition(".")[0]):
            raise
        raise InputError(f"family {family} has no {part}: families/{folder}/{part}.py is missing") from error
