"""Batches read ahead by worker processes, or carried by DALI: the same run, and no hang."""

import signal
import time

import psutil
import pytest

from tests.helpers.runs import (
    arguments_for,
    finish,
    rank_process,
    start,
    tensor_files,
    train_metrics,
    wait_for_step,
)
from tests.helpers.skips import needs_dali

slow = pytest.mark.slow


def run(corpus, directory, *more):
    code, output = finish(start(arguments_for(corpus, directory, *more, recipe="examples/esolm/tiny.py")))
    assert code == 0, output
    return train_metrics(directory), tensor_files(directory)


@pytest.fixture(scope="module")
def without_workers(corpus, tmp_path_factory):
    return run(corpus, tmp_path_factory.mktemp("without") / "run")


@pytest.mark.parametrize(
    ("workers", "loader"),
    [
        pytest.param(2, "torch", marks=slow),
        pytest.param(1, "torch", marks=slow),
        pytest.param(2, "dali", marks=needs_dali),
        pytest.param(0, "dali", marks=[needs_dali, slow]),
    ],
)
def test_loaders_change_no_bit(corpus, tmp_path, without_workers, workers, loader):
    more = ("--data.workers", workers, "--data.loader", loader)
    metrics, tensors = run(corpus, tmp_path / "run", *more)
    assert metrics == without_workers[0]
    assert tensors == without_workers[1]


def start_with_workers(corpus, directory):
    """A run on two ranks, and the worker of each; the first of a rank's children, before any writer."""
    process = start(arguments_for(corpus, directory, "--data.workers", 1, steps=3000), processes=2)
    wait_for_step(process, directory, 2)
    ranks = [rank_process(process, rank) for rank in (0, 1)]
    return process, [min(rank.children(), key=lambda child: child.create_time()) for rank in ranks]


def test_a_dead_worker_ends_the_job_and_is_named(corpus, tmp_path):
    process, workers = start_with_workers(corpus, tmp_path)
    workers[1].kill()
    began = time.monotonic()
    code, output = finish(process)
    assert code == 1 and time.monotonic() - began < 40
    assert f"error on rank 1: data.workers: process {workers[1].pid} ended with exit code -9" in output
    assert psutil.wait_procs(workers, timeout=5)[1] == []


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_as_ever(corpus, tmp_path):
    process, workers = start_with_workers(corpus, tmp_path)
    # As Slurm does it.
    for receiver in [*workers, rank_process(process, 0), rank_process(process, 1)]:
        receiver.send_signal(signal.SIGTERM)
    _, output = finish(process)
    assert "saving and stopping" in output, output
    assert psutil.wait_procs(workers, timeout=5)[1] == []
    last = max(train_metrics(tmp_path))
    assert (tmp_path / "checkpoints" / f"step-{last:08d}").is_dir(), output


@pytest.mark.slow
def test_workers_end_with_a_killed_rank(corpus, tmp_path):
    process, workers = start_with_workers(corpus, tmp_path)
    rank_process(process, 0).kill()
    assert finish(process)[0] == 1
    assert psutil.wait_procs(workers, timeout=5)[1] == []
