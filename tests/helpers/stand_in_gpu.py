"""A GPU on a CPU: tensors that lie on it are known, and whatever makes the CPU wait for it is found.

Waits are: reading a number (item, bool, tolist), copying to the host, copying to the device from memory that
is not pinned or without `non_blocking`, and operators whose result's size depends on values. Tensors are told
apart by their memory: it is the device's where a call names CUDA, or where the device's tensors went in.
"""

import linecache
import sys
import weakref

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dlm.platform import cpu, gpu

SIZES_BY_VALUES = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal"}
SIZES_BY_VALUES |= {"_local_scalar_dense", "is_nonzero", "repeat_interleave"}
TO_HOST = {"cpu", "numpy", "tolist", "__array__"}


class Wait(AssertionError):
    """The CPU waits for the GPU where it should not."""


class StandInGpu:
    """In a process where platform/cpu.py is installed: `torch.device("cuda")` is the GPU from then on."""

    def __init__(self):
        self._device, self._pinned = set(), set()
        self.found = []
        """Places of waits, in order."""
        self._is_watching = False
        cpu.install()
        torch.cuda.current_device = _CurrentDevice(None)
        # Both have been recorded and what came after them has been read: no wait.
        torch.cuda.Event.elapsed_time = lambda begin, end: 1.0
        _Functions(self).__enter__()
        _Operators(self).__enter__()

    def watch(self, watching=True):
        """Raise from now on, where the CPU waits outside the places that the product names."""
        self._is_watching, self.found = watching, []

    def is_on_device(self, tensor):
        return self._key(tensor) in self._device

    def is_pinned(self, tensor):
        return self._key(tensor) in self._pinned

    def put(self, value, where):
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                memory, key = leaf.untyped_storage(), self._key(leaf)
                if key not in where:
                    where.add(key)
                    weakref.finalize(memory, where.discard, key)

    def put_on_device(self, value):
        self.put(value, self._device)

    def pin(self, value):
        self.put(value, self._pinned)

    def wait(self, what):
        if self._is_watching:
            place = gpu.waits[-1] if gpu.waits else None
            if place is None:
                raise Wait(f"{what} waits for the GPU")
            self.found.append(place)

    @staticmethod
    def _key(tensor):
        try:
            return tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            return None


class _CurrentDevice(cpu._Redirect):
    """The GPU where calls are looked at; in a backward pass nothing rewrites what they say of devices."""

    def __call__(self):
        looked_at = torch._C._len_torch_function_stack() > 0
        return torch.device("cuda", 0) if looked_at else torch.device("cpu")


class _Functions(TorchFunctionMode):
    """What a call says of devices, before platform/cpu.py rewrites it."""

    def __init__(self, stand_in):
        super().__init__()
        self._gpu = stand_in

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        is_resident = source is not None and self._gpu.is_on_device(source)
        if is_resident and func == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        if name in TO_HOST and is_resident:
            self._gpu.wait(name)
        asks_for = [value for value in (*args[1:], kwargs.get("device")) if _names_device(value)]
        names_gpu = any(str(value).startswith("cuda") for value in asks_for)
        if name in ("to", "cuda") and source is not None and (names_gpu or name == "cuda"):
            if not is_resident:
                self._check_copy(source, kwargs.get("non_blocking", False), name)
                source = source.clone()
                self._gpu.put_on_device(source)
            # The device is this one; what else is asked for is left.
            rest = [value for value in args[1:] if not _names_device(value)]
            kwargs.pop("device", None)
            return source.to(*rest, **kwargs) if rest or "dtype" in kwargs else source
        elif name == "to" and is_resident and asks_for and not names_gpu:
            self._gpu.wait("to(cpu)")
        result = func(*args, **kwargs)
        if names_gpu and name in ("tensor", "as_tensor"):
            self._gpu.wait(f"torch.{name} on the device")
        if names_gpu:
            self._gpu.put_on_device(result)
        if kwargs.get("pin_memory"):
            self._gpu.pin(result)
        if name == "pin_memory":
            result = result.clone()
            self._gpu.pin(result)
        return result

    def _check_copy(self, source, non_blocking, name):
        if not (non_blocking and self._gpu.is_pinned(source)):
            self._gpu.wait(f"{name}: a copy of {tuple(source.shape)} that is not pinned and non-blocking")


class _Operators(TorchDispatchMode):
    """What operators do with the memory of either side."""

    def __init__(self, stand_in):
        super().__init__()
        self._gpu = stand_in

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__ if hasattr(operator, "overloadpacket") else str(operator)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        resident = [tensor for tensor in tensors if self._gpu.is_on_device(tensor)]
        if not resident:
            return result
        if name in SIZES_BY_VALUES:
            self._gpu.wait(name)
        if name in ("index", "index_put_", "index_put"):
            self._check_indices(args)
        if name == "copy_" and self._gpu.is_on_device(args[0]) != self._gpu.is_on_device(args[1]):
            non_blocking = args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking", False)
            if args[1].dim() and not (non_blocking and self._gpu.is_pinned(args[1])) and not _is_in_gloo():
                self._gpu.wait(f"copy_ of {tuple(args[1].shape)} between host and device")
            return result
        self._gpu.put_on_device(result)
        return result

    def _check_indices(self, args):
        if len(args) > 2 and args[2].numel() == 1:
            # PyTorch fills by a mask then.
            return
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self._gpu.wait("an index of bools")
            if index is not None and index.dim() and not self._gpu.is_on_device(index):
                self._gpu.wait("an index on the host")


def _is_in_gloo():
    """Whether a collective of gloo's, in the place of NCCL's, brings its result."""
    frame = sys._getframe()
    while frame is not None:
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if frame.f_code.co_filename.endswith("distributed_c10d.py") or line.strip() == "handle.wait()":
            return True
        frame = frame.f_back
    return False


def _names_device(value):
    return isinstance(value, torch.device) or (
        isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu")
    )
