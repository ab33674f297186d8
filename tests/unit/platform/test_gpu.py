"""Where a GPU, or what a run asks of it, cannot be used: one line that says why and what to do."""

import importlib
import logging
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import distributed_c10d

from megatron_dlm.interfaces import InputError, TrainingError
from megatron_dlm.kernels.choice import wants_triton
from megatron_dlm.models.precision.fp8 import Fp8Config
from megatron_dlm.platform import gpu, parallel, versions
from megatron_dlm.platform.launch import detect_environment
from megatron_dlm.platform.parallel_config import ParallelConfig
from tests.helpers import faulty
from tests.helpers.distributed import run_distributed
from tests.helpers.paths import ROOT
from tools import tiny

CUDA = torch.device("cuda", 0)
FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
    "1.10 GiB is free. Including non-PyTorch memory, this process has 78.00 GiB memory in use. Of the "
    "allocated memory"
)


@pytest.fixture
def machine(monkeypatch):
    """A machine by what PyTorch and /dev say of it."""

    def describe(*, built=True, files=True, error="", visible=None, container=False):
        def init():
            raise RuntimeError(error + "\nmore lines")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.version, "cuda", "13.0" if built else None)
        monkeypatch.setattr(gpu, "gpu_files", lambda: [Path("/dev/nvidia0")] if files else [])
        for module in (gpu, parallel):
            monkeypatch.setattr(module, "is_container", lambda *environ: container)
        if visible is None:
            monkeypatch.delenv(gpu.VISIBLE, raising=False)
        else:
            monkeypatch.setenv(gpu.VISIBLE, visible)

    return describe


DRIVER = "Unexpected error from cudaGetDeviceCount(). Error 803: unsupported display driver / cuda driver"


@pytest.mark.parametrize(
    "of, device, expected",
    [
        ({"visible": ""}, "cuda", "CUDA_VISIBLE_DEVICES is '', which hides all GPUs"),
        ({"visible": "-1"}, "cuda", "CUDA_VISIBLE_DEVICES is '-1', which hides all GPUs"),
        ({"built": False}, "cuda", rf"this PyTorch, {re.escape(torch.__version__)}, is built without CUDA"),
        ({"files": False}, "cuda", "this machine has no NVIDIA GPU"),
        ({"files": False, "container": True}, "cuda", "this container has no NVIDIA GPU; docker run --gpus"),
        ({"error": DRIVER}, "cuda", "the driver does not work: Unexpected error .* cuda driver$"),
        ({"error": DRIVER}, "auto", "the driver does not work: .* cuda driver; --parallel.device cpu does"),
    ],
)
def test_why_there_is_no_cuda(machine, of, device, expected):
    machine(**of)
    with pytest.raises(InputError) as caught:
        parallel.prepare_device(detect_environment(), ParallelConfig(device=device))
    message = str(caught.value)
    assert message.startswith(f"parallel.device: {device}") and " cannot be used: " in message
    assert "\n" not in message
    assert re.search(expected, message), message


@pytest.mark.parametrize("of", [{"visible": ""}, {"built": False}, {"files": False}])
def test_auto_takes_the_cpu_where_nobody_expects_a_gpu(machine, of):
    machine(**of)
    reason, is_unexpected = gpu.why_no_cuda()
    assert reason and not is_unexpected


@pytest.fixture
def told():
    """What the package's logger is given; a command that was here has left it without propagation."""
    messages, logger = [], logging.getLogger("megatron_dlm")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_auto_in_a_container_without_gpus_says_so(machine, told, monkeypatch):
    machine(files=False, container=True)
    monkeypatch.setattr("megatron_dlm.platform.cpu.install", lambda: None)
    device = parallel.prepare_device(detect_environment(), ParallelConfig(device="auto"))
    assert device.type == "cpu"
    assert any(
        "parallel.device: auto takes the CPU: this container has no NVIDIA GPU" in line for line in told
    )


def test_a_device_that_the_driver_refuses(monkeypatch):
    def refuse(device):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(
        InputError, match=r"^parallel.device: cuda:0 cannot be used: .* ECC error encountered$"
    ):
        gpu.start_cuda(CUDA)


class SlowStore:
    """The store as a rank sees it that is slower than the others."""

    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        return getattr(self.store, name)

    def wait(self, keys):
        self.store.wait(keys)
        time.sleep(1)


def share(state, name):
    if state.rank == 1:
        store = SlowStore(distributed_c10d._get_default_store())
        distributed_c10d._get_default_store = lambda: store
    try:
        gpu.refuse_shared_gpus(state.rank, state.world_size, name.format(rank=state.rank))
    except InputError as error:
        return str(error)
    return ""


def test_two_ranks_on_one_gpu():
    messages = run_distributed(share, 2, "host, GPU-12")
    assert messages[0] == messages[1]
    assert messages[0].endswith(
        "have the same one (host, GPU-12), and NCCL needs a GPU for each rank: start as many processes on a "
        "node as it has GPUs"
    )
    assert run_distributed(share, 2, "host, GPU-{rank}") == ["", ""]


def test_an_old_gpu_takes_pytorch_with_one_line(monkeypatch, told):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not wants_triton("auto", CUDA)
    assert told == [
        "training.kernels: auto takes PyTorch's on Tesla T4 (compute capability 7.5); Triton's need 8.0"
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    pytest.importorskip("triton")
    assert wants_triton("auto", CUDA) and len(told) == 1


@pytest.mark.parametrize(
    "recipe, capability, fits",
    [
        ("tensorwise", (8, 0), False),
        ("tensorwise", (8, 9), True),
        ("delayed", (8, 0), False),
        ("blockwise", (8, 9), False),
        ("blockwise", (9, 0), True),
        ("mxfp8", (9, 0), False),
        ("mxfp8", (10, 0), True),
    ],
)
def test_fp8_on_a_chip_without_it(recipe, capability, fits):
    config = Fp8Config(recipe=recipe)
    if fits:
        config.check_capability(capability, "a GPU")
        return
    with pytest.raises(
        InputError, match=rf"^training.precision: fp8 with fp8.recipe {recipe} needs .* an A100"
    ):
        config.check_capability(capability, "an A100")


@pytest.mark.parametrize("version", ["2.8.0", "2.12.0", "2.20.2"])
def test_a_transformer_engine_that_does_not_fit(monkeypatch, version):
    monkeypatch.setattr(versions, "version", lambda package: version)
    with pytest.raises(
        InputError, match=rf"^transformer-engine: {version} does not fit: megatron-core 0.16.1 needs"
    ):
        versions.check_transformer_engine()


BROKEN = "raise RuntimeError('no transformer_engine_torch*.so.\\nmore lines')"
START = """
from megatron_dlm.platform import versions
versions.import_transformer_engine()
import megatron.core.tensor_parallel
print(versions.has_transformer_engine())
versions.check_transformer_engine()
"""


@pytest.mark.parametrize("works", [False, True])
def test_a_transformer_engine_without_its_pytorch_part(tmp_path, works):
    """megatron-core, which would end in its RuntimeError, is imported without it; then one line says why."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text("" if works else BROKEN)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    program = START if not works else START.replace("import megatron.core.tensor_parallel\n", "")
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert finished.stdout == "True\n"
    if works:
        assert finished.returncode == 0, finished.stderr
        return
    last = finished.stderr.strip().splitlines()[-1]
    assert (
        "InputError: transformer-engine: unknown version cannot be imported (no transformer_engine_torch"
        in last
    )
    assert "its PyTorch part comes with pip install" in last and "--training.transformer-impl local" in last


def test_another_megatron_core(monkeypatch):
    versions.check_megatron_core()
    monkeypatch.setattr(versions, "version", lambda package: "0.17.0")
    with pytest.raises(
        InputError, match=r"^megatron-core: 0.17.0; this version of megatron-dlm needs 0.16.1 or, on CPUs"
    ):
        versions.check_megatron_core()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_newer_megatron_core_is_taken_and_told_of_on_gpus(monkeypatch, told, on_gpu):
    monkeypatch.setattr(versions, "version", lambda package: "0.19.2")
    versions.check_megatron_core(on_gpu=on_gpu)
    assert ["megatron-core: 0.19.2 has run on CPUs only" in line for line in told] == [True] * on_gpu


def fill_memory(owner, name):
    module, _, attribute = owner.rpartition(".")

    def refuse(*arguments, **keywords):
        raise torch.OutOfMemoryError(FULL)

    setattr(getattr(importlib.import_module(module), attribute), name, refuse)


PLACES = {
    "weights": (
        ("megatron_dlm.models.denoiser.Denoiser", "__init__"),
        "the model's weights",
        "raise parallel.tensor_model_parallel_size",
    ),
    "moments": (
        ("torch.optim.AdamW", "step"),
        "the optimizer's moments",
        "raise parallel.tensor_model_parallel_size",
    ),
    "activations": (
        ("megatron_dlm.models.denoiser.Denoiser", "forward"),
        "the activations of a microbatch",
        "lower training.micro_batch_size, set training.recompute full",
    ),
    "head": (
        ("megatron_dlm.models.head.Head", "forward"),
        "the logits of a chunk of rows",
        "lower training.head_rows_per_chunk",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_full_memory_says_of_what_and_what_to_lower(corpus, tmp_path, place):
    from megatron_dlm.families.mdlm.objective import MDLMConfig

    where, what, cure = PLACES[place]
    config = tiny.run_config(corpus, tmp_path, MDLMConfig())
    config = replace(config, optimizer=config.optimizer)
    code, output = faulty.train_in_child(config, fill_memory, *where)
    assert code == 1, output
    lines = [line for line in output.splitlines() if "error" in line]
    assert len(lines) == 1 and len(output.splitlines()) == 1, output
    assert f"GPU memory: {what}: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has" in lines[0]
    assert "1.10 GiB is free; " in lines[0] and cure in lines[0]


def test_the_innermost_place_speaks():
    with (
        pytest.raises(TrainingError, match=r"^GPU memory: inside"),
        gpu.allocating("outside", "nothing"),
        gpu.allocating("inside", "nothing"),
    ):
        raise torch.OutOfMemoryError(FULL)


def test_full_memory_leaves_a_snapshot_where_one_is_recorded(tmp_path, monkeypatch):
    recorded = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **to: recorded.append(to))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: open(path, "w").close())
    monkeypatch.setattr(gpu, "_snapshot", None)
    path = tmp_path / "profiles" / "memory-rank-0.pickle"
    gpu.record_memory(path)
    said = f"memory snapshot for pytorch.org/memory_viz: {path}$"
    with pytest.raises(TrainingError, match=said), gpu.allocating("x", "y"):
        raise torch.OutOfMemoryError(FULL)
    assert path.exists() and recorded == [{"max_entries": gpu.RECORDED_ALLOCATIONS}]
    monkeypatch.setattr(gpu, "_snapshot", path / "under a file")
    with pytest.raises(TrainingError, match="no memory snapshot: "), gpu.allocating("x", "y"):
        raise torch.OutOfMemoryError(FULL)
