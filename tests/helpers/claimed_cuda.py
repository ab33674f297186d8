"""CUDA that claims to be there in forks of this process, on any machine, and answers to none of them.

So it is in a fork of a process that uses CUDA: CUDA is said to be available, and the driver refuses whoever
starts it.
"""

import os

import torch
from torch.overrides import TorchFunctionMode

from megatron_dlm.platform import cpu

MESSAGE = "Cannot re-initialize CUDA in forked subprocess"


def claim_cuda():
    """In a process where platform/cpu.py stands in for the device's calls, before it forks."""
    owner = os.getpid()
    cpu.install()
    touching = {*cpu._REPLACEMENTS, "_lazy_init", "init", "mem_get_info", "memory_stats", "ipc_collect"}
    for name in touching - {"default_generators", "device_count", "_lazy_call"}:
        setattr(torch.cuda, name, _Refused(getattr(torch.cuda, name), owner))
    for name in ("current_device_index", "current_stream", "synchronize", "set_device_index"):
        setattr(torch.accelerator, name, _Refused(getattr(torch.accelerator, name), owner))
    for module in (torch.cuda, torch.accelerator):
        module.is_available = lambda: os.getpid() != owner
        module.device_count = lambda: 1
    original = torch.accelerator.current_accelerator
    torch.accelerator.current_accelerator = lambda check_available=False: (
        torch.device("cuda") if os.getpid() != owner else original(check_available)
    )
    _NoDeviceTensorsIn(owner).__enter__()


class _Refused(cpu._Redirect):
    """A call of the device's in any process but one."""

    def __init__(self, original, owner):
        self._original, self._owner = original, owner

    def __call__(self, *arguments, **keywords):
        if os.getpid() != self._owner:
            raise RuntimeError(MESSAGE)
        return self._original(*arguments, **keywords)


class _NoDeviceTensorsIn(TorchFunctionMode):
    """Refuses device and pinned tensors in any process but one."""

    def __init__(self, owner):
        super().__init__()
        self._owner = owner

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if os.getpid() != self._owner and (
            func in (torch.Tensor.pin_memory, torch.Tensor.is_pinned, torch.Tensor.cuda)
            or kwargs.get("pin_memory")
            or str(kwargs.get("device")).startswith("cuda")
        ):
            raise RuntimeError(MESSAGE)
        return func(*args, **kwargs)
