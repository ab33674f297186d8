"""Ranks that die or hang, signals, full disks and damaged checkpoints under torchrun, mpirun and srun."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.mpi import find_mpirun
from tests.helpers.paths import ROOT
from tests.helpers.processes import CPU
from tests.helpers.runs import STEPS, arguments_for, finish, start, tensor_files, train_metrics, wait_for_step
from tools.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
RANKS = {"torchrun": "RANK", "mpirun": "OMPI_COMM_WORLD_RANK", "srun": "SLURM_PROCID"}
"""Environment variable of a rank, by launcher."""
TIMEOUT = 8
PREEMPTING = {"torchrun": signal.SIGTERM, "mpirun": signal.SIGUSR1, "srun": signal.SIGUSR1}
"""Signal to the launcher that its ranks get and save on."""


@pytest.fixture(params=RANKS)
def launch(request, corpus, tmp_path):
    """Start a run of two ranks; its process has the launcher's name as `launcher`."""
    launcher = request.param
    environment = os.environ | CPU | {"PYTHON": sys.executable}
    if launcher == "mpirun":
        if find_mpirun() is None:
            pytest.skip("mpirun is not installed")
        path = f"{os.path.dirname(find_mpirun())}:{os.environ['PATH']}"
        environment |= {"PATH": path, "MPIRUN_FLAGS": "--allow-run-as-root --oversubscribe"}
    cluster = request.getfixturevalue("slurm") if launcher == "srun" else None

    def begin(*more, steps=STEPS):
        limit = ["--parallel.collective-timeout-seconds", TIMEOUT, "--checkpoint.on-corrupt", "previous"]
        words = list(map(str, arguments_for(corpus, tmp_path / "run", *limit, *more, steps=steps)))
        if cluster is not None:
            task = ["srun", "--nodes", "2", "--ntasks-per-node", "1", "--chdir", str(ROOT)]
            task += ["--kill-on-bad-exit=0", "--wait=5", sys.executable, "-W", "ignore", "-m", "megatron_dlm"]
            process = cluster.start(*task, *words, MASTER_ADDR="127.0.0.1", **CPU)
        else:
            script = {"torchrun": "torchrun", "mpirun": "mpi"}[launcher]
            sizes = {"GPUS_PER_NODE": "2", "NUM_PROCESSES": "2", "MASTER_PORT": str(free_port())}
            process = subprocess.Popen(
                [f"examples/{script}/train.sh", *words[1:]],
                cwd=ROOT,
                env=environment | sizes,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        process.launcher = launcher
        return process

    return begin


def ranks_of(process, directory):
    """The run's processes by rank."""
    found = {}
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            rank = each.environ().get(RANKS[process.launcher])
            words = each.cmdline()
            if rank is not None and str(directory) in words and "train" in words and "srun" not in words[0]:
                if "mpirun" not in words[0] and "torchrun" not in " ".join(words[:6]):
                    found[int(rank)] = each
    return found


def last_step(directory):
    return max((entry["step"] for entry in read_metrics(directory)), default=0)


def both_ranks(process, directory):
    found = ranks_of(process, directory)
    assert sorted(found) == [0, 1], found
    return found


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_ends_the_job_in_time_and_it_goes_on(launch, corpus, tmp_path, fate):
    directory = tmp_path / "run"
    process = launch(steps=5000)
    wait_for_step(process, directory, 6)
    ranks = both_ranks(process, directory)
    began = time.monotonic()
    ranks[1].send_signal(fate)
    # The other rank first, then what the launcher needs to end one that does not listen.
    ranks[0].wait(TIMEOUT + 20)
    code, output = finish(process)
    assert time.monotonic() - began < TIMEOUT + 60
    assert code not in (0, 3), output
    assert fate == signal.SIGKILL or "rank 1 is gone or hangs" in output, output
    assert psutil.wait_procs(ranks.values(), timeout=12)[1] == []
    again = launch(steps=5000)
    output = ""
    while "continues from step" not in output:
        output += (line := again.stdout.readline())
        assert line, output
    for rank in both_ranks(again, directory).values():
        rank.kill()
    finish(again)


def test_a_signal_to_one_rank_saves_all(launch, tmp_path):
    directory = tmp_path / "run"
    process = launch(steps=5000)
    wait_for_step(process, directory, 3)
    ranks = both_ranks(process, directory)
    ranks[1].send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == 3, output
    stopped = max(train_metrics(directory))
    assert (directory / "checkpoints" / f"step-{stopped:08d}").is_dir()
    assert psutil.wait_procs(ranks.values(), timeout=5)[1] == []


def test_faults_in_a_row_lose_nothing(launch, corpus, tmp_path):
    """Each attempt is disturbed; the end is bit for bit that of a run that was not."""
    directory, dice = tmp_path / "run", random.Random(0)
    slow = ["--training.global-batch-size", 32, "--checkpoint.save-every", 1, "--checkpoint.keep-last", 3]
    codes = []
    for fault in ("kill", "signal", "damage", "kill", "hang", "signal", "damage", "none", "none", "none"):
        process = launch(*slow)
        reached = last_step(directory)
        while process.poll() is None and last_step(directory) <= min(reached, STEPS - 1):
            time.sleep(0.02)
        ranks = ranks_of(process, directory)
        if fault in ("kill", "hang") and len(ranks) == 2:
            ranks[dice.randrange(2)].send_signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        elif fault == "signal" and process.poll() is None:
            process.send_signal(PREEMPTING[process.launcher])
        code, output = finish(process)
        codes.append(code)
        assert psutil.wait_procs(ranks.values(), timeout=12)[1] == [], output
        complete = sorted((directory / "checkpoints").glob("step-????????"))
        if fault == "damage" and len(complete) > 1 and code != 0:
            path = dice.choice(sorted(complete[-1].iterdir()))
            content = bytearray(path.read_bytes())
            content[dice.randrange(len(content))] ^= 1
            path.write_bytes(content)
        if code == 0:
            break
    assert codes[-1] == 0, codes
    whole = tmp_path / "whole"
    code, output = finish(start(arguments_for(corpus, whole, *slow), processes=2))
    assert code == 0, output
    assert train_metrics(directory) == train_metrics(whole)
    assert tensor_files(directory) == tensor_files(whole)
    assert not re.findall("tmp$", " ".join(path.name for path in (directory / "checkpoints").iterdir()))
