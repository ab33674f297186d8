"""CUDA graphs on a CPU: what runs under `torch.cuda.graph` is recorded operator by operator and replayed.

As with the real ones a replay reads and writes the memory of the recording, runs no Python of the model and
knows nothing of what changed elsewhere. `install` lets torch's graphed callables run on that.
"""

import torch
from torch._C._distributed_c10d import FakeWork, Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Tape:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.operators = []
        self.replays = 0

    @torch.no_grad()
    def replay(self):
        """Run all operators again, into the memory of the first time."""
        self.replays += 1
        for operator, args, kwargs, recorded in self.operators:
            for new, old in zip(_tensors(_finished(operator(*args, **kwargs))), recorded, strict=True):
                if new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
                    old.copy_(new)


def _tensors(result):
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _finished(result):
    """A collective's result when it is there; waiting for it again does nothing, and so is not recorded."""

    def done(leaf):
        if not isinstance(leaf, torch.ScriptObject):
            return leaf
        leaf.wait()
        return Work.boxed(FakeWork())

    return tree_map(done, result)


class _Recorder(TorchDispatchMode):
    def __init__(self, tape):
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = _finished(operator(*args, **(kwargs or {})))
        self._tape.operators.append((operator, args, kwargs or {}, _tensors(result)))
        return result


class _Capture:
    """In place of `torch.cuda.graph`."""

    def __init__(self, tape, pool=None, stream=None, capture_error_mode="global"):
        self._recorder = _Recorder(tape)

    def __enter__(self):
        self._recorder.__enter__()

    def __exit__(self, *error):
        self._recorder.__exit__(*error)


tapes = []


def install():
    """In a process where platform/cpu.py is installed."""

    def new_tape():
        tapes.append(Tape())
        return tapes[-1]

    torch.cuda.CUDAGraph = new_tape
    torch.cuda.graph = _Capture
    torch.cuda.graphs.graph_pool_handle = lambda: (0, 0)
