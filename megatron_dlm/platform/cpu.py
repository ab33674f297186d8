"""Lets megatron-core run on a CPU: the `torch.cuda` calls it makes unconditionally go to the CPU.

The only patching here. Installed when there is
no CUDA device or the CPU is asked for; a CUDA run never imports this file.
Each redirection can go once megatron-core asks for a device instead of assuming CUDA (NVIDIA/Megatron-LM).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
NORM_PIECE = 1 << 18


def install() -> None:
    """Redirect `torch.cuda` to the CPU for the rest of the process, and import megatron-core.

    A second call changes nothing.

    Raises:
        RuntimeError: megatron-core was imported first, so it has seen GPU extras this call would hide.
    """
    if isinstance(torch.cuda.current_device, _Redirect):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("platform.cpu.install must run before megatron.core is imported")
    _hide_gpu_extras()
    for name, replacement in _REPLACEMENTS.items():
        setattr(torch.cuda, name, replacement)
    # Recomputation asks for the state by this name.
    torch.cuda.random.get_rng_state = _REPLACEMENTS["get_rng_state"]
    _CudaToCpu().__enter__()
    _import_megatron_core()


def _import_megatron_core() -> None:
    # megatron-core passes small functions to torch.compile when it is imported. Here they stay as they are:
    # they would need a C++ compiler, and torch's own takes half as long to import as all of megatron-core.
    # wandb, which its inference imports where it is installed, takes a second more.
    compile_function, has_wandb = torch.compile, "wandb" in sys.modules
    torch.compile = lambda function: function  # type: ignore[assignment]
    if not has_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        from megatron.core.jit import disable_jit_fuser
    finally:
        torch.compile = compile_function
        if not has_wandb:
            del sys.modules["wandb"]
    disable_jit_fuser()


def _hide_gpu_extras() -> None:
    # A transformer-engine wheel without GPU libraries raises RuntimeError on import, which megatron-core
    # does not catch; `apex` on PyPI is another project. Both must look absent.
    for module in ("transformer_engine", "apex"):
        sys.modules.setdefault(module, None)  # type: ignore[arg-type]


class _Redirect:
    """A stand-in function that returns a fixed value and marks that `install` has run."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


class _Event:
    """CPU work is done when the call returns, so an event has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.record = self.wait = self.synchronize = _Redirect(None)
        self.query = _Redirect(True)


class _Stream:
    """CPU work has one order, so streams never wait."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.wait_stream = self.wait_event = self.synchronize = _Redirect(None)

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        return None


class _OneGenerator:
    """The CPU's generator in the place of every device's."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator


_REPLACEMENTS: dict[str, Any] = {
    "current_device": _Redirect(CPU),
    "device_count": _Redirect(1),
    "set_device": _Redirect(None),
    "synchronize": _Redirect(None),
    "empty_cache": _Redirect(None),
    "Stream": _Stream,
    "Event": _Event,
    "current_stream": _Redirect(_Stream()),
    "default_stream": _Redirect(_Stream()),
    "stream": _Redirect(contextlib.nullcontext()),
    # megatron-core saves and restores the CPU and the CUDA generator; here both are the one CPU generator.
    "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
    "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    "manual_seed": lambda seed: torch.manual_seed(seed),
    "default_generators": _OneGenerator(),
    # CUDA would keep these calls until its first use, which never comes.
    "_lazy_call": lambda function, **kwargs: function(),
}


_REWRITTEN = frozenset({torch.Tensor.pin_memory, torch.Tensor.cuda, torch.Tensor.type})
"""Functions whose calls are rewritten even without keyword arguments."""


class _CudaToCpu(TorchFunctionMode):
    """Rewrites device arguments that name CUDA in any torch call, and mends the gradient norm."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # A step of a small model makes thousands of calls: most need nothing.
        if not kwargs and func not in _REWRITTEN:
            return func(*args)
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func in (torch.Tensor.pin_memory, torch.Tensor.cuda):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer tells its parameter classes apart by names such as torch.cuda.FloatTensor.
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.norm and kwargs.get("p") == "fro" and kwargs.get("dim") is None:
            # torch 2.13's float32 norm is off by 1e-4 at 2M elements on a CPU, and by another amount for
            # each split of the same gradient: clipping would depend on the layout.
            return _accurate_norm(args[0])
        return func(*args, **kwargs)


def _accurate_norm(values: torch.Tensor) -> torch.Tensor:
    """The 2-norm, summed in float64 piece by piece: a float64 copy of a large tensor costs more."""
    pieces = values.detach().reshape(-1).split(NORM_PIECE)
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
    return torch.linalg.vector_norm(torch.stack(norms)).to(values.dtype)


def _to_cpu(device: Any) -> Any:
    names_cuda = isinstance(device, int) or str(device).startswith("cuda")
    return CPU if names_cuda else device
