"""Batches made ahead in worker processes: the same as made at once, and no hang where a worker is gone."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from megatron_dlm.data.loading.prefetch import Prefetcher
from megatron_dlm.interfaces import InputError, TrainingError
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT


def squares(number):
    if number == 13:
        raise InputError("data: block 13 is bad")
    return {"process": os.getpid(), "values": torch.full((3,), number) ** 2}


def prefetcher(workers=2, transfer=None):
    return Prefetcher(squares, lambda n: n + 1, workers=workers, transfer=transfer)


@pytest.fixture
def children():
    """The children since the test began."""
    others = psutil.Process().children()
    return lambda: [child for child in psutil.Process().children() if child not in others]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_is_asked_for_comes_whatever_was_guessed(children, workers):
    source = prefetcher(workers=workers)
    for number in (3, 4, 5, 8, 9, 3, 4):
        made = source.get(number)
        assert made["values"].tolist() == [number**2] * 3
        assert (made["process"] == os.getpid()) == (workers == 0)
    source.close()
    assert not children()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_worker_is_an_error_at_once(children, number):
    source = prefetcher(workers=2)
    source.get(0)
    worker = children()[0]
    worker.send_signal(number)
    began = time.monotonic()
    with pytest.raises(TrainingError, match=rf"data\.workers: process {worker.pid} ended .* -{number:d}$"):
        for step in range(1, 10):
            source.get(step)
    assert time.monotonic() - began < 5
    assert not children()


def test_a_worker_that_dies_while_it_writes_is_an_error(children):
    """A message that the pipe does not hold: the worker is in the middle of it until it is read."""
    source = Prefetcher(lambda n: torch.full((1 << 22,), n), lambda n: n + 1, workers=1)
    source.get(0)
    time.sleep(0.5)
    (worker,) = children()
    worker.kill()
    began = time.monotonic()
    with pytest.raises(TrainingError, match=rf"process {worker.pid} ended with exit code -9"):
        source.get(1)
    assert time.monotonic() - began < 5


def test_a_stopped_worker_ends_with_the_rest(children):
    source = prefetcher(workers=1)
    source.get(0)
    children()[0].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    source.close()
    assert time.monotonic() - began < 2 and not children()


def test_workers_end_with_a_program_that_never_closes_them():
    code = (
        "from tests.unit.data.loading.test_prefetch import prefetcher\n"
        "source = prefetcher(workers=2)\n"
        "print(source.get(3)['values'].tolist())\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=HANG_SECONDS
    )
    assert finished.returncode == 0 and finished.stdout == "[9, 9, 9]\n", finished.stderr


def test_signals_of_the_job_do_not_end_workers(children):
    source = prefetcher(workers=1)
    source.get(0)
    (worker,) = children()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        worker.send_signal(number)
    assert [source.get(step)["values"][0].item() for step in range(1, 8)] == [n**2 for n in range(1, 8)]
    source.close()


def test_bad_data_is_reported_as_without_workers():
    for workers in (0, 2):
        source = prefetcher(workers=workers)
        source.get(12)
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(InputError, match=r"^data: block 13 is bad$"):
                source.get(13)
        assert source.get(14)["values"][0] == 196
        assert time.monotonic() - began < 3
        source.close()


def test_other_errors_come_with_where_they_were():
    source = Prefetcher(lambda n: 1 // (3 - n), lambda n: n + 1, workers=1)
    source.get(2)
    with pytest.raises(RuntimeError, match=r"(?s)in a loader process:.*ZeroDivisionError"):
        source.get(3)


def test_what_is_made_is_transferred_in_order():
    for workers in (0, 2):
        source = prefetcher(workers=workers, transfer=lambda made: (m["values"] + 1 for m in made))
        assert [source.get(n).tolist() for n in (1, 2, 3, 7)] == [[2] * 3, [5] * 3, [10] * 3, [50] * 3]
        source.close()
