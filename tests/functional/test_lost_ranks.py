"""Ranks that die, stop or sleep: the others end in time and say who it was."""

import signal
import time

import psutil
import pytest

from tests.helpers.runs import (
    arguments_for,
    finish,
    rank_process,
    start,
    start_ranks,
    tensor_files,
    train_metrics,
    wait_for_step,
)
from tests.helpers.selection import quick, slow

FATES = {
    "killed": (signal.SIGKILL, 15.0),
    "stopped": (signal.SIGSTOP, 20.0),
}


@pytest.mark.parametrize("fate", quick(FATES, "killed"))
@pytest.mark.parametrize("rank", [slow(0), 1])
def test_the_others_end_and_name_the_rank(corpus, tmp_path, fate, rank):
    number, seconds = FATES[fate]
    more = ["--parallel.collective-timeout-seconds", 8]
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
def test_a_frozen_rank_0_that_keeps_the_store_ends_the_others_too(corpus, tmp_path):
    """As under srun and mpirun: its store answers nobody."""
    more = ["--parallel.collective-timeout-seconds", 4]
    ranks = start_ranks(arguments_for(corpus, tmp_path, *more, steps=5000), 2)
    wait_for_step(ranks[0], tmp_path, 3)
    ranks[0].send_signal(signal.SIGSTOP)
    try:
        code, output = finish(ranks[1])
    finally:
        ranks[0].kill()
        ranks[0].communicate()
    assert code == 1 and "Timed out" in output, output


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
