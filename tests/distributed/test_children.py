"""No child process touches the GPU of its parent, where libraries would; a save's copies are its own."""

import ast
import gc
import multiprocessing
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_dlm.checkpointing.host_memory import HostMemory
from megatron_dlm.checkpointing.layout import CheckpointRoot
from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.families.mdlm.objective import MDLMConfig
from megatron_dlm.platform.parallel_config import ParallelConfig
from megatron_dlm.platform.subprocess_lifetime import fork
from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers import faulty
from tests.helpers.claimed_cuda import claim_cuda
from tests.helpers.distributed import run_distributed
from tests.helpers.paths import ROOT
from tests.helpers.processes import context
from tests.helpers.sessions import build_random
from tests.helpers.skips import needs_dali
from tools import tiny

RUNS = {
    "a synchronous save": {},
    "an asynchronous save": {"checkpoint__async_save": True},
    "loader workers": {"data__workers": 2},
    "pinned memory": {"data__loader": "pinned"},
    "pinned memory and workers": {"data__loader": "pinned", "data__workers": 2},
    "DALI": {"data__loader": "dali"},
    "DALI and workers": {"data__loader": "dali", "data__workers": 2},
}


def marks_of(name):
    # What workers are added to is run without them among the slow ones.
    marks = [needs_dali] if "DALI" in name else []
    return (
        [*marks, pytest.mark.slow]
        if name in ("pinned memory", "DALI", "loader workers", "pinned memory and workers")
        else marks
    )


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in RUNS])
def test_a_run_where_cuda_answers_to_the_parent_alone(corpus, tmp_path, name):
    plain = tiny.run_config(corpus, tmp_path / "plain", MDLMConfig())
    claimed = tiny.run_config(
        corpus, tmp_path / "claimed", MDLMConfig(), parallel__device="cpu", **RUNS[name]
    )
    for config, fault in ((plain, None), (claimed, claim_cuda)):
        code, output = faulty.train_in_child(config, fault)
        assert code == 0 and "was not saved" not in output, output
    losses = [
        [entry["loss"] for entry in read_metrics(config.directory) if entry["kind"] == "train"]
        for config in (plain, claimed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    files = [
        {
            path.name: path.read_bytes()
            for path in (CheckpointRoot(config.directory / "checkpoints").final(4)).glob("*.distcp")
        }
        for config in (plain, claimed)
    ]
    assert files[0] == files[1] != {}


def index_where_cuda_is_claimed(corpus, output):
    claim_cuda()
    config = IndexConfig(input=(str(corpus.text),), output=output, tokenizer=corpus.tokenizer, workers=2)
    build_shards(config, lambda progress: None)


def test_workers_of_the_indexer_where_cuda_answers_to_the_parent_alone(corpus, tmp_path):
    process = context.Process(target=index_where_cuda_is_claimed, args=(corpus, tmp_path / "shard"))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "shard.bin").read_bytes() == corpus.train.with_suffix(".bin").read_bytes()


class Device:
    """What only the process that made it may free, in a circle, as recordings and streams are."""

    def __init__(self, freed):
        self.owner, self.freed, self.circle = os.getpid(), freed, self

    def __del__(self):
        self.freed.value = int(os.getpid() != self.owner)


def what_a_child_sees(state):
    claim_cuda()
    gc.disable()
    freed = multiprocessing.RawValue("i", 0)
    Device(freed)
    # As a collection does that comes before a child's own code.
    os.register_at_fork(after_in_child=gc.collect)
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def look():
        from torch._utils import _get_available_device_type

        gc.collect()
        sender.send(
            {
                "torch.cuda": (torch.cuda.is_available(), torch.cuda.device_count()),
                "torch.accelerator": (torch.accelerator.is_available(), torch.accelerator.device_count()),
                "accelerator": torch.accelerator.current_accelerator(),
                "device of checkpoints": _get_available_device_type(),
                "CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"],
                "freed": freed.value,
                "threads": torch.get_num_threads(),
            }
        )

    child = fork(look)
    seen = receiver.recv()
    child.join()
    return seen


def test_a_child_sees_no_gpu_and_frees_nothing_of_one():
    (seen,) = run_distributed(what_a_child_sees, 1)
    assert seen == {
        "torch.cuda": (False, 0),
        "torch.accelerator": (False, 0),
        "accelerator": None,
        "device of checkpoints": None,
        "CUDA_VISIBLE_DEVICES": "",
        "freed": 0,
        "threads": 1,
    }


def test_every_child_is_started_in_one_place():
    """So that what holds for one holds for all."""
    starters = {"get_context", "Process", "Pool", "ProcessPoolExecutor", "fork", "forkpty", "start_processes"}
    found = set()
    for path in (ROOT / "megatron_dlm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            # psutil's looks at processes that are there.
            if ast.unparse(node) == "psutil.Process":
                continue
            if isinstance(node, ast.Attribute) and node.attr in starters:
                found.add((path.relative_to(ROOT).as_posix(), node.attr))
    assert found == {
        ("megatron_dlm/platform/subprocess_lifetime.py", "get_context"),
        ("megatron_dlm/platform/subprocess_lifetime.py", "Process"),
    }


def bytes_later(copies, seconds, sender):
    time.sleep(seconds)
    sender.send([copy.clone().numpy().tobytes() for copy in copies])
    time.sleep(seconds)


def test_copies_belong_to_a_save_until_its_child_has_ended():
    memory = HostMemory()
    sources = [torch.rand(1000), torch.arange(7), torch.tensor(2.5), torch.zeros(0), torch.rand(8, 8).t()]
    expected = [source.contiguous().numpy().tobytes() for source in sources]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    copies = memory.hold(sources)
    assert all(torch.equal(copy, source) for copy, source in zip(copies, sources, strict=True))
    child = fork(bytes_later, copies, 0.3, sender)
    for source in sources:
        source.fill_(1)
    with pytest.raises(AssertionError, match="another save has the memory"):
        memory.hold(sources)
    memory.release(child)
    # The next save waits for the child, whose memory this is too.
    copies = memory.hold(sources)
    assert not child.is_alive()
    assert receiver.recv() == expected
    assert all((copy == 1).all() for copy in copies)


class ClaimedTensor(torch.Tensor):
    """A CPU's tensor that says it is on a GPU."""

    is_cuda = True


class Registrations:
    """Host memory as CUDA pins it: an address that is pinned is not pinned again."""

    ALREADY_REGISTERED = 712

    def __init__(self):
        self.addresses = set()

    def cudaHostRegister(self, address, size, flags):
        if address in self.addresses:
            return self.ALREADY_REGISTERED
        self.addresses.add(address)
        return 0

    def cudaHostUnregister(self, address):
        self.addresses.remove(address)
        return 0


def test_forgotten_memory_is_no_longer_pinned(monkeypatch):
    """The next run of a process may be given its address, which CUDA refuses while it is pinned."""
    registrations = Registrations()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: registrations)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    tensor = torch.ones(1 << 16).as_subclass(ClaimedTensor)
    for sizes in ((1, 1), (1, 4), (2,)):
        memory = HostMemory()
        for size in sizes:
            # A larger save takes another region, and gives the first one back.
            memory.hold([tensor] * size)
            assert len(registrations.addresses) == 1
            memory.release()
        del memory
        assert not registrations.addresses


def save_late_from_a_claimed_gpu(state, config):
    from megatron_dlm.checkpointing.async_writer import SavePlans
    from megatron_dlm.checkpointing.manager import PendingSave, load

    claim_cuda()
    faulty.slow_down_writers(0.5)
    session = build_random(state, config)
    # Tensors on this device are copied before the child starts, which platform/cpu.py lays on the CPU.
    state = replace(state, device=torch.device("cuda"))
    plans, root = SavePlans(state), CheckpointRoot(config.directory)
    first = [p.detach().clone() for p in session.denoiser.parameters()]
    for step in (1, 2):
        pending = PendingSave(root, step, session.denoiser, session.optimizer, state, plans, {}, 60.0)
        with torch.no_grad():
            for parameter in session.denoiser.parameters():
                parameter.fill_(step)
            session.optimizer.reload_model_params()
        blocks = [torch.full((1 << 18,), 9.0, pin_memory=True) for _ in range(4)]
        assert all(block.sum() > 0 for block in blocks)
        pending.finish()
    found = []
    for step in (1, 2):
        load(root.final(step), session.denoiser, session.optimizer, state)
        found.append([p.detach().clone() for p in session.denoiser.parameters()])
    equal = [torch.equal(a, b) for a, b in zip(first, found[0], strict=True)]
    return equal, [bool((p == 1).all()) for p in found[1]]


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tensor_model_parallel_size=2)])
def test_a_late_writer_writes_the_bytes_of_its_own_step(corpus, tmp_path, parallel):
    config = replace(tiny.run_config(corpus, tmp_path, MDLMConfig()), parallel=parallel)
    results = run_distributed(save_late_from_a_claimed_gpu, 2, config, parallel=parallel)
    for first, second in results:
        assert all(first) and all(second) and first


def no_memory_on_one_rank(state, config):
    from megatron_dlm.checkpointing.async_writer import SavePlans
    from megatron_dlm.checkpointing.manager import PendingSave
    from megatron_dlm.interfaces import SaveError

    def hold(tensors):
        raise MemoryError("4,096 bytes of host memory: Cannot allocate memory")

    session = build_random(state, config)
    state = replace(state, device=torch.device("cuda"))
    plans = SavePlans(state)
    original, root = plans.memory.hold, CheckpointRoot(config.directory)
    if state.rank == 1:
        plans.memory.hold = hold
    messages = []
    for _ in range(2):
        try:
            PendingSave(root, 1, session.denoiser, session.optimizer, state, plans, {}, 60.0).finish()
            messages.append("")
        except SaveError as error:
            messages.append(str(error))
        plans.memory.hold = original
    return messages


def test_a_rank_without_memory_for_its_copies_is_heard_by_all(corpus, tmp_path):
    config = tiny.run_config(corpus, tmp_path, MDLMConfig())
    messages = run_distributed(no_memory_on_one_rank, 2, config)
    assert messages == [
        ["1 other ranks have no memory for their copies", ""],
        ["4,096 bytes of host memory: Cannot allocate memory", ""],
    ]
    assert CheckpointRoot(tmp_path).complete()
