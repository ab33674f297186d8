"""Packages and libraries: there, of versions that fit each other, and what they claim to be."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_dlm.doctor.finding import Finding
from megatron_dlm.interfaces import InputError
from megatron_dlm.platform.versions import (
    MEGATRON_CORE,
    TRANSFORMER_ENGINE,
    check_transformer_engine,
    deciding_versions,
    has_transformer_engine,
    import_transformer_engine,
    installed_version,
    is_newer_megatron_core,
)

TOPIC = "software"
DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")
LAUNCHERS = ("srun", "mpirun")


def look_at_software() -> list[Finding]:
    """Findings on packages; imports torch, and Transformer Engine where there is a GPU."""
    import torch

    has_gpu = torch.cuda.is_available()
    return [
        Finding(TOPIC, "Python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        Finding(TOPIC, "PyTorch", "ok", _torch_versions()),
        _megatron_core(),
        _transformer_engine(has_gpu),
        _apex(has_gpu),
        _triton(has_gpu),
        _dali(),
        _mpi(),
        _launchers(),
    ]


def _torch_versions() -> str:
    import torch

    parts = [str(torch.__version__)]
    if torch.version.cuda is not None:
        parts.append(f"CUDA {torch.version.cuda}")
        cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
        if cudnn:
            parts.append(f"cuDNN {cudnn}")
    if nccl := deciding_versions()["nccl"]:
        parts.append(f"NCCL {nccl}")
    return ", ".join(parts)


def _megatron_core() -> Finding:
    found = installed_version("megatron-core")
    if found == MEGATRON_CORE:
        return Finding(TOPIC, "megatron-core", "ok", found)
    cure = f"pip install megatron-core=={MEGATRON_CORE}"
    if is_newer_megatron_core(found):
        return Finding(TOPIC, "megatron-core", "note", f"{found}, which has run on CPUs only", cure)
    return Finding(TOPIC, "megatron-core", "failed", found or "not installed", cure)


def _transformer_engine(has_gpu: bool) -> Finding:
    name, found = "Transformer Engine", installed_version("transformer-engine")
    if not has_transformer_engine():
        cure = "pip install megatron-dlm[gpu]; without it there is no FP8 and attention is PyTorch's"
        return Finding(TOPIC, name, "note" if has_gpu else "ok", "not installed", cure if has_gpu else "")
    if not has_gpu:
        return Finding(TOPIC, name, "ok", f"{found}, not used without a GPU")
    import_transformer_engine()
    try:
        check_transformer_engine()
    except InputError as error:
        return Finding(TOPIC, name, "failed", str(error), f"versions {TRANSFORMER_ENGINE}")
    return Finding(TOPIC, name, "ok", str(found))


def _apex(has_gpu: bool) -> Finding:
    """NVIDIA's apex has no use here but its fast optimizer, where Transformer Engine has none."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        used = "not installed; megatron-core takes "
        used += "Transformer Engine's Adam" if has_gpu and has_transformer_engine() else "PyTorch's AdamW"
        return Finding(TOPIC, "apex", "ok", used)
    directories = [Path(place) for place in spec.submodule_search_locations or ()]
    found = installed_version("apex") or "of unknown version"
    if not any((directory / "optimizers").is_dir() for directory in directories):
        cure = "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex"
        return Finding(TOPIC, "apex", "note", f"{found} is another project of that name, not NVIDIA's", cure)
    is_built = importlib.util.find_spec("amp_C") is not None
    if not is_built:
        cure = "build it with --cpp_ext and --cuda_ext"
        return Finding(TOPIC, "apex", "note", f"NVIDIA's {found}, without its CUDA extensions", cure)
    taken = "not used: " if has_transformer_engine() else "megatron-core takes its Adam: "
    return Finding(TOPIC, "apex", "ok", f"{taken}NVIDIA's {found}")


def _triton(has_gpu: bool) -> Finding:
    found = installed_version("triton")
    if found or not has_gpu:
        return Finding(TOPIC, "Triton", "ok", found or "not installed; needed on GPUs only")
    return Finding(TOPIC, "Triton", "note", "not installed", "install the PyTorch that brings it")


def _dali() -> Finding:
    found = [f"{name} {version}" for name in DALI_PACKAGES if (version := installed_version(name))]
    if found:
        return Finding(TOPIC, "DALI", "ok", ", ".join(found))
    return Finding(TOPIC, "DALI", "ok", "not installed; needed for data.loader dali only")


def _mpi() -> Finding:
    found, mpirun = installed_version("mpi4py"), shutil.which("mpirun")
    library = "no mpirun in PATH"
    if mpirun is not None:
        told = subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout
        library = (told.splitlines() or [mpirun])[0]
    needed = "" if found else "; needed for indexing under mpirun only"
    return Finding(TOPIC, "MPI", "ok", f"{library}, mpi4py {found or 'not installed'}{needed}")


def _launchers() -> Finding:
    there = [name for name in LAUNCHERS if shutil.which(name)]
    own = f"{Path(sys.executable).name} -m megatron_dlm.cli.torchrun"
    return Finding(TOPIC, "launchers", "ok", ", ".join([own, *there]))
