"""The Python files of an export: the model, the samplers and what they need, flat and without this package.

The samplers are this package's own files. Only their imports are rewritten, so that both sides run one text.
"""

from __future__ import annotations

import re
from importlib import resources

MODEL = "conversion.hugging_face_model"
SHIPPED = (
    *(f"{MODEL}.{part}_megatron_dlm" for part in ("configuration", "modeling", "cache", "noise")),
    *(f"{MODEL}.{part}_megatron_dlm" for part in ("likelihood", "generation", "verify")),
    "platform.rng",
    *(f"sampling.{part}" for part in ("categorical", "decoding_plan", "eos", "generate", "network", "noise")),
    *(f"sampling.{part}" for part in ("network_reader", "schedules", "settings", "start", "uniform")),
    "sampling.unmasking",
)
"""Modules inside this package."""
MODELING = f"{MODEL}.modeling_megatron_dlm"
PROGRAM = f"{MODEL}.verify_megatron_dlm"
"""Run by itself; the model does not import it."""
_IMPORT = re.compile(r"^(\s*)from megatron_dlm\.([\w.]+) import", re.MULTILINE)


def file_name(module: str) -> str:
    """Name of a module's file in an export, without a suffix: "sampling.start" is sampling_start."""
    return module.removeprefix(f"{MODEL}.").replace(".", "_")


def remote_code() -> dict[str, str]:
    """Text of every file by name.

    Returns:
        What an export holds of Python.
    """
    files = {}
    for module in SHIPPED:
        package, _, name = module.rpartition(".")
        text = resources.files(f"megatron_dlm.{package}").joinpath(f"{name}.py").read_text(encoding="utf-8")
        text = _IMPORT.sub(lambda found: f"{found[1]}from .{file_name(found[2])} import", text)
        files[f"{file_name(module)}.py"] = text
    files[f"{file_name(MODELING)}.py"] += _names_of_all_files()
    return files


def _names_of_all_files() -> str:
    lines = [
        f"from .{file_name(module)} import __name__ as _  # noqa: E402, F401\n"
        for module in SHIPPED
        if module not in (MODELING, PROGRAM)
    ]
    return "\n# transformers 4 copies the files alone that this one names.\n" + "".join(lines)
