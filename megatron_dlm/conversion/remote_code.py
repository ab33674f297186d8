"""The Python files of an export: the model, its family's sampler and likelihood, and what these import.

They are this package's own files, copied into one flat folder, since transformers finds no others; only their
imports are rewritten, so that package and export run the same code. Files that nothing imports are left out.
"""

from __future__ import annotations

import re
from importlib import resources

from megatron_dlm.families.registry import OBJECTIVES, folder_of, likelihood_of, sampler_of

MODEL = "conversion.hugging_face_model"
MODELING = f"{MODEL}.modeling_megatron_dlm"
CAUSAL = f"{MODEL}.causal_megatron_dlm"
"""Model with transformers' own generation; in exports of autoregressive models only."""
FAMILY = f"{MODEL}.family_megatron_dlm"
"""Module from which the model imports its family; generated for each export."""
PROGRAM = f"{MODEL}.verify_megatron_dlm"
"""Stand-alone verification script; the model does not import it."""
_IMPORT = re.compile(r"^(\s*)from megatron_dlm\.([\w.]+) import", re.MULTILINE)
_BESIDE = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)


def file_name(module: str) -> str:
    """Name of a module's file in an export, without a suffix: "sampling.start" is sampling_start."""
    return module.removeprefix(f"{MODEL}.").replace(".", "_")


def remote_code(family: str) -> dict[str, str]:
    """Text of every Python file of an export.

    Args:
        family: registered name of the family.

    Returns:
        Text of each file by file name.

    Raises:
        InputError: the family has no sampler or no likelihood.
    """
    texts = {FAMILY: _family_text(family), PROGRAM: _text(PROGRAM)}
    waiting = [MODELING, *_imported(texts[FAMILY])]
    if OBJECTIVES[family].predicts_next_token:
        waiting.append(CAUSAL)
    while waiting:
        module = waiting.pop()
        if module not in texts:
            texts[module] = _text(module)
            waiting += _imported(texts[module])
    shared = texts.keys() - {MODELING, CAUSAL, PROGRAM}
    texts[MODELING] += _names_of(sorted(shared))
    if CAUSAL in texts:
        texts[CAUSAL] += _names_of(sorted(shared))
    return {
        f"{file_name(module)}.py": _IMPORT.sub(lambda m: f"{m[1]}from .{file_name(m[2])} import", text)
        for module, text in sorted(texts.items())
    }


def _text(module: str) -> str:
    package, _, name = module.rpartition(".")
    place = resources.files(".".join(filter(None, ("megatron_dlm", package))))
    return place.joinpath(f"{name}.py").read_text(encoding="utf-8")


def _imported(text: str) -> list[str]:
    """Modules of this package that a file of an export imports."""
    beside = [f"{MODEL}.{name}" for name in _BESIDE.findall(text)]
    return [*beside, *(module for _, module in _IMPORT.findall(text))]


def _family_text(family: str) -> str:
    # A missing part is an error before anything is written.
    sampler_of(family), likelihood_of(family)
    folder = folder_of(family)
    return f'''"""Samplers and likelihood of the model's family."""

from megatron_dlm.families.{folder}.likelihood import Likelihood
from megatron_dlm.families.{folder}.sampler import Sampler


def sampler_for(config):
    """The samplers of the model."""
    return Sampler.from_config(config)


def likelihood_for(config):
    """The likelihood of the model."""
    return Likelihood(config)
'''


def _names_of(modules: list[str]) -> str:
    lines = [f"from .{file_name(module)} import __name__ as _  # noqa: E402, F401\n" for module in modules]
    return "\n# transformers 4 copies the files alone that this one names.\n" + "".join(lines)
