"""Runs under a real Slurm: ranks on two nodes, the time limit, a node that goes down."""

import contextlib
import json
import re
import sys

import psutil
import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.paths import ROOT
from tests.helpers.runs import arguments_for, finish, start, train_metrics

pytestmark = pytest.mark.slow
STEPS = 40
NEVER = 100_000
SAVE_EACH_STEP = ["--checkpoint.save-every", 1, "--checkpoint.keep-last", 2]


@pytest.fixture
def submit(slurm, corpus, tmp_path):
    """Send examples/slurm/train.sh to two nodes; returns the job's number."""

    def send(steps, *options):
        layout = ["--nodes", 2, "--ntasks-per-node", 1, "--chdir", ROOT, "--output", tmp_path / "output"]
        script = ROOT / "examples" / "slurm" / "train.sh"
        _train, *arguments = arguments_for(corpus, tmp_path / "run", *SAVE_EACH_STEP, steps=steps)
        # Both nodes are this machine, where their names do not resolve.
        environment = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
        words = ["sbatch", "--parsable", *layout, *options, script, *arguments]
        return slurm.run(*words, **environment).strip()

    return send


def last_step(directory):
    return max((entry["step"] for entry in read_metrics(directory)), default=0)


def wait_for_step(slurm, directory, step):
    slurm.wait_until(lambda: last_step(directory) >= step, f"step {step}")


def start_again(slurm, job):
    """Without the two minutes that a requeued job waits, and with time to end."""
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=20")


def ranks(slurm):
    """Processes of ranks, each with its environment variables."""
    found = {}
    for process in slurm.processes():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if "SLURM_STEP_ID" in environment and "megatron_dlm" in process.cmdline():
                found[process] = environment
    return found


def kill_ranks_on(slurm, node):
    for process, environment in ranks(slurm).items():
        if environment["SLURMD_NODENAME"] == node:
            process.kill()


def nodes_and_restarts(slurm):
    return {(e["SLURMD_NODENAME"], e.get("SLURM_RESTART_COUNT")) for e in ranks(slurm).values()}


def steps_reported(output):
    return [
        int(step)
        for step in re.findall(r"^[-\d]+ [:\d]+ train step (\d+)/", output.read_text(), re.MULTILINE)
    ]


def newest_tensors(directory):
    newest = max((directory / "checkpoints").glob("step-????????"))
    return {path.name: path.read_bytes() for path in newest.glob("*.distcp")}


def assert_as_uninterrupted(corpus, directory, whole):
    """The run in `directory` equals one under torchrun, in all bits."""
    arguments = arguments_for(corpus, whole, steps=last_step(directory))
    code, output = finish(start(arguments, processes=2))
    assert code == 0, output
    assert train_metrics(directory) == train_metrics(whole)
    assert newest_tensors(directory) == newest_tensors(whole)


def test_ranks_find_each_other(slurm):
    body = "import json, megatron_dlm.platform.launch as l; print(json.dumps(vars(l.detect_environment())))"
    words = ["srun", "--nodes", 2, "--ntasks-per-node", 2, "--chdir", ROOT, sys.executable, "-c", body]
    found = sorted(map(json.loads, slurm.run(*words).splitlines()), key=lambda seen: seen["rank"])
    common = {"launcher": "slurm", "world_size": 4, "local_world_size": 2, "master_addr": "n1"}
    common |= {"is_on_one_node": False}
    port = {"master_port": found[0]["master_port"]}
    assert found == [common | port | {"rank": rank, "local_rank": rank % 2} for rank in range(4)]


def test_the_time_limit_saves_and_requeues_and_nothing_is_lost(slurm, submit, corpus, tmp_path):
    directory, output = tmp_path / "run", tmp_path / "output"
    # Slurm looks every 30 s and signals one look early: after 30 to 60 s of 120.
    job = submit(NEVER, "--time", 2, "--signal", "USR1@60")
    wait_for_step(slurm, directory, 3)
    assert nodes_and_restarts(slurm) == {("n1", None), ("n2", None)}
    slurm.wait_for_job(job, JobState="PENDING", Restarts="1")
    stopped = last_step(directory)
    assert set(re.findall(r"srun: error: .* exit code (\d+)", output.read_text())) == {"3"}
    assert (directory / "checkpoints" / f"step-{stopped:08d}").is_dir()
    start_again(slurm, job)
    wait_for_step(slurm, directory, stopped + 3)
    assert nodes_and_restarts(slurm) == {("n1", "1"), ("n2", "1")}
    slurm.run("scancel", "--signal", "USR1", job)
    slurm.wait_for_job(job, JobState="PENDING", Restarts="2")
    assert steps_reported(output) == list(range(1, last_step(directory) + 1))
    assert_as_uninterrupted(corpus, directory, tmp_path / "whole")


def test_a_lost_node_requeues_and_nothing_is_lost(slurm, submit, corpus, tmp_path):
    directory, output = tmp_path / "run", tmp_path / "output"
    job = submit(STEPS)
    wait_for_step(slurm, directory, 6)
    # Its rank goes with it, before it could save; Slurm must know before the other rank ends the job.
    kill_ranks_on(slurm, "n2")
    slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    slurm.wait_for_job(job, JobState="PENDING", Restarts="1")
    reached = last_step(directory)
    slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    start_again(slurm, job)
    wait_for_step(slurm, directory, reached + 1)
    assert nodes_and_restarts(slurm) == {("n1", "1"), ("n2", "1")}
    slurm.wait_for_job(job, JobState="COMPLETED", ExitCode="0:0", Restarts="1")
    reported = steps_reported(output)
    assert sorted(set(reported)) == list(range(1, STEPS + 1))
    assert len(reported) - STEPS <= 1
    assert_as_uninterrupted(corpus, directory, tmp_path / "whole")


def test_a_killed_rank_requeues(slurm, submit, tmp_path):
    """The node stays up; only the run's exit code tells that a process was killed."""
    directory, output = tmp_path / "run", tmp_path / "output"
    job = submit(NEVER)
    wait_for_step(slurm, directory, 3)
    kill_ranks_on(slurm, "n2")
    slurm.wait_for_job(job, JobState="PENDING", Restarts="1")
    newest = max((directory / "checkpoints").glob("step-????????"))
    step = int(newest.name.removeprefix("step-"))
    assert f"the job starts again: killed by signal 9; starts again from step {step}" in output.read_text()
    assert json.loads((directory / "requeues.json").read_text()) == {"step": step, "starts": 1}
