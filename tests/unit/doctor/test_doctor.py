"""Each thing the doctor looks at is called failed or noted where it is, with what to do about it."""

import os
import shutil
import socket
import time
from collections import namedtuple

import pytest
import torch

from megatron_dlm.doctor import finding, job, machine, software
from megatron_dlm.platform.launch import ProcessEnvironment
from megatron_dlm.platform.versions import MEGATRON_CORE
from tests.helpers.distributed import run_distributed

Usage = namedtuple("Usage", "total used free")


def by_name(findings):
    return {each.name: each for each in findings}


def environment(rank, world_size):
    return ProcessEnvironment(
        launcher="test",
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        master_addr="127.0.0.1",
        master_port=0,
    )


def test_this_machine_can_run(tmp_path):
    findings = [*software.look_at_software(), *machine.look_at_machine(tmp_path / "not" / "yet", quick=False)]
    assert finding.can_run(findings)
    names = by_name(findings)
    assert names["megatron-core"].value == MEGATRON_CORE
    assert str(tmp_path) in names["disk"].value
    assert "MB/s" in names["disk speed"].value
    assert not list(tmp_path.iterdir())


def test_another_megatron_core_fails(monkeypatch):
    versions = {"megatron-core": "0.15.0"}
    monkeypatch.setattr(software, "installed_version", lambda name: versions.get(name))
    found = by_name(software.look_at_software())["megatron-core"]
    assert (found.status, found.value) == ("failed", "0.15.0") and MEGATRON_CORE in found.cure


@pytest.mark.parametrize(
    ("folders", "modules", "status", "says"),
    [
        (["apex"], [], "note", "another project of that name"),
        (["apex/optimizers"], [], "note", "without its CUDA extensions"),
        (["apex/optimizers"], ["amp_C.py"], "ok", "megatron-core takes its Adam: NVIDIA's"),
        ([], [], "ok", "not installed"),
    ],
)
def test_apex_is_told_from_its_namesake(tmp_path, monkeypatch, folders, modules, status, says):
    """Without importing it: the namesake's import fails in ways of its own."""
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / "apex" / "__init__.py").write_text("raise SystemError('imported')\n")
    for module in modules:
        (tmp_path / module).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = software._apex(has_gpu=True)
    assert found.status == status and says in found.value


def test_small_shared_memory_few_files_and_a_slow_disk_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 0, 64 * 2**20))
    monkeypatch.setattr(machine.resource, "getrlimit", lambda what: (256, 1024))
    monkeypatch.setattr(machine, "SLOW_DISK_MB_S", float("inf"))
    names = by_name(machine.look_at_machine(tmp_path, quick=False))
    assert names["/dev/shm"].status == "note" and "--ipc host" in names["/dev/shm"].cure
    assert names["open files"].status == "note" and "4096" in names["open files"].cure
    assert names["disk speed"].status == "note"


def test_a_directory_that_cannot_be_written_to_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    assert by_name(machine.look_at_machine(tmp_path, quick=True))["disk"].status == "failed"


def test_gpus_that_do_not_work_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "why_no_cuda", lambda: ("the driver does not work: too old", True))
    found = by_name(machine.look_at_machine(tmp_path, quick=True))["GPUs"]
    assert found.status == "failed" and "too old" in found.value and "parallel.device cpu" in found.cure


def look_at_four(state, directory, oddity):
    """What all ranks find where rank 3 is odd in one way."""
    is_odd = state.rank == 3
    hosts = ["alpha", "alpha", "beta", "beta"]
    socket.gethostname = lambda: hosts[state.rank]
    if oddity == "versions" and is_odd:
        agreed = job.deciding_versions
        job.deciding_versions = lambda: agreed() | {"numpy": "0.1"}
    if oddity == "clocks" and is_odd:
        now = time.time
        time.time = lambda: now() + 7.0
    if oddity == "storage" and is_odd:
        directory = directory / "elsewhere"
        directory.mkdir()
    if oddity == "places":
        hosts[2] = "alpha"
    found = job.look_at_job(environment(state.rank, 4), state.device, directory, quick=oddity != "none")
    return by_name(found)


@pytest.mark.parametrize(
    ("oddity", "name", "status", "says"),
    [
        ("versions", "versions", "failed", "on rank 0 and 0.1 on rank 3 on beta"),
        ("clocks", "clocks", "note", "+7.0 s on rank 3 on beta"),
        ("storage", "storage", "failed", "of rank 0 on alpha is not seen by rank 3 on beta"),
        ("places", "processes", "note", "unequally: alpha 3, beta 1"),
        ("none", "all-reduce", "ok", "GB/s bus bandwidth"),
    ],
)
def test_a_rank_that_differs_is_named_with_its_host(tmp_path, oddity, name, status, says):
    for names in run_distributed(look_at_four, 4, tmp_path, oddity):
        assert names[name].status == status and says in names[name].value
        others = {other for other, found in names.items() if found.status != "ok"}
        assert others == ({name} if status != "ok" else set())
        if oddity == "none":
            assert "from rank" in names["point to point"].value
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".doctor")]


def test_memory_that_does_not_suffice_fails(monkeypatch, tmp_path):
    from megatron_dlm.doctor import recipe
    from tools import tiny

    corpus = tiny.make_corpus(tmp_path)
    from megatron_dlm.families.registry import OBJECTIVES

    config = tiny.run_config(corpus, tmp_path / "run", OBJECTIVES["mdlm"]())
    cpu = torch.device("cpu")
    assert finding.can_run(recipe.look_at_recipe(config, 2, 2, cpu))
    monkeypatch.setitem(recipe.PROCESS_GIB, "cpu", 1e5)
    names = by_name(recipe.look_at_recipe(config, 2, 2, cpu))
    assert names["memory"].status == "failed" and "megatron-dlm plan" in names["memory"].cure
    monkeypatch.setattr(recipe, "CHECKPOINT_BYTES", 1e12)
    names = by_name(recipe.look_at_recipe(config, 2, 2, cpu))
    assert names["checkpoints"].status == ("failed" if config.checkpoint.keep_last else "ok")
    shutil.rmtree(corpus.tokenizer)
    assert by_name(recipe.look_at_recipe(config, 2, 2, cpu))["tokenizer"].status == "note"
    corpus.train.with_suffix(".bin").unlink()
    (start,) = recipe.look_at_recipe(config, 2, 2, cpu)
    assert start.status == "failed" and "train.bin" in start.value
