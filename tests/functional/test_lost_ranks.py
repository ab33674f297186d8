"""Ranks that die, stop or sleep: the others end in time and say who it was."""

import signal
import time

import psutil
import pytest

from tests.helpers.runs import arguments_for, finish, start, tensor_files, train_metrics, wait_for_step


def rank_process(launcher, rank):
    """The training process of one rank under torchrun."""
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if "megatron_dlm" in child.cmdline() and child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"rank {rank} is not there")


FATES = {
    "killed": (signal.SIGKILL, 15.0),
    "stopped": (signal.SIGSTOP, 20.0),
}


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_end_and_name_the_rank(corpus, tmp_path, fate, rank):
    number, seconds = FATES[fate]
    more = ["--parallel.collective-timeout-seconds", 4]
    process = start(arguments_for(corpus, tmp_path, *more, steps=5000), processes=2)
    wait_for_step(process, tmp_path, 3)
    lost, left = (rank_process(process, r) for r in (rank, 1 - rank))
    began = time.monotonic()
    lost.send_signal(number)
    left.wait(seconds)
    if fate == "stopped":
        # torchrun would give it 30 s more.
        lost.kill()
    code, output = finish(process)
    assert time.monotonic() - began < seconds + 5
    assert code == 1
    assert f"error on rank {1 - rank}: rank {rank} is gone or hangs" in output, output
    assert psutil.wait_procs([lost, left], timeout=5)[1] == []


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_nothing_is_lost(corpus, tmp_path):
    process = start(arguments_for(corpus, tmp_path), processes=2, options=["--max-restarts", "2"])
    wait_for_step(process, tmp_path, 6)
    rank_process(process, 1).kill()
    code, output = finish(process)
    assert code == 0, output
    whole = tmp_path / "whole"
    code, output = finish(start(arguments_for(corpus, whole), processes=2))
    assert code == 0, output
    assert train_metrics(tmp_path) == train_metrics(whole)
    assert tensor_files(tmp_path) == tensor_files(whole)
