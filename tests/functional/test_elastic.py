"""Jobs whose nodes are lost, leave and join, on hosts with addresses of their own."""

import signal
import time

import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.network_hosts import Hosts, HostsMissingError, kill_all
from tests.helpers.runs import arguments_for, finish, rank_process, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 300


@pytest.fixture
def hosts(tmp_path):
    """Three hosts."""
    directory = tmp_path / "hosts"
    directory.mkdir()
    try:
        with Hosts(3, directory) as made:
            yield made
    except HostsMissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def job(hosts, corpus, tmp_path):
    """Start the launcher of one node."""
    # Steps of some 0.1 s: nodes come and go within the run.
    shape = ["--training.global-batch-size", 64, "--parallel.collective-timeout-seconds", 6]
    arguments = arguments_for(corpus, tmp_path / "run", *shape, steps=STEPS)[1:]

    def launch(host, nodes, *more, **environment):
        place = {"NUM_NODES": nodes, "NODE_RANK": str(host), "MASTER_ADDR": "node0", "GPUS_PER_NODE": "1"}
        meeting = {"RDZV_CONF": "last_call_timeout=4,join_timeout=90,read_timeout=10"}
        script = ("examples/torchrun/train.sh", *arguments, *more)
        return hosts.start(host, *script, **(place | meeting | environment))

    return launch


def losses(directory):
    """Last logged loss of each step."""
    return {entry["step"]: entry["loss"] for entry in read_metrics(directory) if entry["kind"] == "train"}


def test_nodes_are_lost_and_join_and_the_losses_stay(job, corpus, tmp_path):
    """3 nodes start, of which 64 = 16 x 4 samples keep 2 busy; one is lost, and comes back."""
    nodes = [job(host, "1:3") for host in range(3)]
    said = nodes[0].read_until("step 20/")
    assert "2 of 3 processes work and rank 2 waits: training.global_batch_size: 64 is not a mult" in said, (
        said
    )
    assert "starts on 3 nodes x 1 processes" in said
    kill_all(nodes[1])
    said = nodes[0].read_until("continues from step")
    assert "starts again on 2 nodes" in said and "waits" not in said, said
    assert "2 data parallel" in said, said
    nodes[1] = job(1, "1:3")
    said = nodes[0].read_until("continues from step")
    assert "starts again on 3 nodes" in said, said
    # They saved before they stopped: no step is made twice.
    saved = said[: said.index("starts again")].rpartition("saved step ")[2].split()[0]
    assert f"continues from step {saved} of" in said, said
    ended = [node.finish() for node in nodes]
    assert [code for code, _ in ended] == [0, 0, 0], ended
    assert "Traceback" not in "".join(output for _, output in ended)
    shape = ["--training.global-batch-size", 64, "--checkpoint.save-every", 1000]
    code, output = finish(start(arguments_for(corpus, tmp_path / "whole", *shape, steps=STEPS), processes=2))
    assert code == 0, output
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert len(losses(tmp_path / "run")) == STEPS


def test_a_node_without_a_network_is_left_behind(hosts, job):
    """It answers nothing, not even that it is gone."""
    nodes = [job(host, "1:2") for host in range(2)]
    nodes[0].read_until("step 8/")
    hosts.unplug(1)
    said = nodes[0].read_until("continues from step")
    assert "rank 1 is gone or hangs" in said and "starts again on 1 node x" in said, said
    code, output = nodes[1].finish()
    assert code == 4 and "the node of the rendezvous, node0:29500, is lost" in output, output
    code, output = nodes[0].finish()
    assert code == 0, output


@pytest.mark.parametrize("fate", ["killed", "unplugged"])
def test_the_loss_of_the_rendezvous_ends_the_job_in_one_line_and_it_starts_again(hosts, job, fate):
    nodes = [job(host, "1:2") for host in range(2)]
    nodes[0].read_until("saved")
    if fate == "killed":
        kill_all(nodes[0])
    else:
        hosts.unplug(0)
    began = time.monotonic()
    code, output = nodes[1].finish()
    assert time.monotonic() - began < 60
    lines = output.splitlines()
    assert code == 4, output
    assert "the node of the rendezvous, node0:29500, is lost, and the job ends; started again" in lines[-1]
    if fate == "killed":
        # And of the rank that it takes with it; where a rank hung, its stack would be there too.
        assert [line for line in lines[:-1] if "rank 0 is gone or hangs" not in line] == [], output
        nodes = [job(host, "1:2") for host in range(2)]
        assert "2 data parallel" in nodes[0].read_until("continues from step")


def test_a_signal_to_one_node_takes_it_out_and_to_all_ends_the_job(job):
    nodes = [job(host, "1:2") for host in range(2)]
    nodes[0].read_until("step 8/")
    # Of a scheduler, to the launcher.
    rank_process(nodes[1], 1).parent().send_signal(signal.SIGTERM)
    code, output = nodes[1].finish()
    assert code == 3 and "Traceback" not in output, output
    said = nodes[0].read_until("continues from step")
    assert "saved step" in said and "starts again on 1 node x" in said, said
    nodes[0].read_until("train step")
    rank_process(nodes[0], 0).parent().send_signal(signal.SIGUSR1)
    code, output = nodes[0].finish()
    assert code == 3 and "exit code 3; the same command goes on" in output, output


@pytest.mark.parametrize("nodes", ["2", "2:2"])
def test_all_nodes_of_a_job_that_none_may_leave_end_with_the_lost_one(job, nodes):
    """Static rendezvous, and an elastic one of fixed size."""
    started = [job(host, nodes, RDZV_CONF="last_call_timeout=4,join_timeout=5") for host in range(2)]
    started[0].read_until("step 8/")
    kill_all(started[1])
    code, output = started[0].finish()
    assert code == 4 and "rank 1 is gone or hangs" in output, output
    assert output.count("torchrun: error") == 1 and "Traceback" not in output, output


def test_ranks_that_die_are_started_again_three_times_without_a_new_checkpoint(job, tmp_path):
    node = job(0, "1:1", "--checkpoint.save-every", 100, MASTER_ADDR="127.0.0.1")
    for _ in range(4):
        node.read_until("train step")
        rank_process(node, 0).kill()
    code, output = node.finish()
    assert code == 137 and "torchrun: error: rank 0 was ended by SIGKILL" in output, output


def test_errors_are_not_tried_again(job, tmp_path):
    node = job(0, "1:1", "--schedule.lr", 1e30, MASTER_ADDR="127.0.0.1")
    code, output = node.finish()
    assert code == 1 and output.count("starts on") == 1 and "starts again" not in output, output


def test_a_wait_for_nodes_that_do_not_come_ends(job, tmp_path):
    code, output = job(0, "2:3", RDZV_CONF="join_timeout=5").finish()
    assert code == 4 and "--nnodes: 2:3, and too few nodes have met at node0:29500 in time" in output, output
    code, output = job(1, "1:2", RDZV_CONF="read_timeout=5").finish()
    assert code == 1 and "MASTER_ADDR: the nodes have not met at node0:29500" in output, output
    assert "Traceback" not in output, output
    assert not (tmp_path / "run" / "checkpoints").exists()
