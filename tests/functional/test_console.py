"""What a run says: on a terminal, in a pipe, under launchers; started, stopped, resumed, finished."""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.mpi import find_mpirun
from tests.helpers.paths import ROOT
from tests.helpers.processes import CPU, TRAINER
from tests.helpers.runs import STEPS, arguments_for, finish, start, start_interpreter, wait_for_step
from tests.helpers.selection import slow
from tools.ports import free_port

pyte = pytest.importorskip("pyte")
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def lines_of(output):
    """Messages without their times; each must have one."""
    lines = output.splitlines()
    assert all(re.match(TIME, line) for line in lines), output
    return [re.sub(TIME, "", line) for line in lines]


def on_a_terminal(words, columns=80, rows=60):
    """Run a command on a terminal; its exit code, and what the screen shows at the end."""
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    leader, follower = pty.openpty()
    environment = os.environ | CPU | {"TERM": "xterm", "COLUMNS": str(columns), "LINES": str(rows)}
    command = [sys.executable, *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=follower, stderr=follower) as process:
        os.close(follower)
        while True:
            try:
                stream.feed(os.read(leader, 1 << 16))
            except OSError:
                # The last process has closed it.
                break
    os.close(leader)
    return process.returncode, [line.rstrip() for line in screen.display if line.strip()]


def test_a_run_says_what_it_is_what_it_saves_and_how_it_ends(uninterrupted):
    directory, output = uninterrupted
    lines = lines_of(output)
    start = lines[: lines.index("starts from scratch")]
    for expected in (
        r"objective: mdlm",
        r"processes: 1 = 1 tensor x 1 pipeline x 1 context x 1 data parallel, on cpu",
        r"model: [\d,]+ body parameters, 2 layers, 2 heads, fp32",
        r"step: \d+ samples x 32 = [\d,]+ tokens, \d+ microbatches of 4 a process",
        rf"run: {STEPS} steps, [\d,]+ tokens",
        rf"directory: {re.escape(str(directory))}",
        r"data: \S+ \([\d,]+ tokens, [\d.]+ epochs to come\); validation \S+",
    ):
        assert sum(bool(re.fullmatch(expected, line)) for line in start) == 1, (expected, output)
    saved = [line for line in lines if line.startswith("saved ")]
    assert [re.search(r"step-0*(\d+) in [\d.]+ s$", line)[1] for line in saved] == ["4", "8", "12", "14"]
    assert re.fullmatch(rf"done: step {STEPS} of {STEPS} in 0:\d\d:\d\d", lines[-1])


def test_the_run_file_is_there_from_the_start(corpus, tmp_path):
    directory = tmp_path / "run"
    process = start(arguments_for(corpus, directory, steps=10**6))
    wait_for_step(process, directory, 1)
    record = json.loads((directory / "run.json").read_text())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert record["config"]["training"]["num_steps"] == 10**6 and record["config"]["data"]["seq_length"] == 32
    assert record["command"][-1] and record["world_size"] == 1 and record["launcher"] == "single"
    assert {"python", "torch", "megatron-core", "megatron-dlm"} <= record["versions"].keys()
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", record["git_revision"]["commit"])


def test_a_run_says_what_it_continues_from_and_what_has_changed(corpus, tmp_path, uninterrupted):
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted[0], directory)
    again = ["--training.num-steps", STEPS, "--schedule.lr", "1e-4"]
    code, output = finish(start(arguments_for(corpus, directory, *again)))
    assert code == 0
    assert lines_of(output) == [
        f"{directory} has reached step {STEPS} of {STEPS}; raise --training.num-steps to go on"
    ]
    more = ["--training.num-steps", STEPS + 2, "--schedule.lr", "1e-4", "--telemetry.console", "plain"]
    code, output = finish(start(arguments_for(corpus, directory, *more)))
    (line,) = (line for line in lines_of(output) if line.startswith("continues"))
    assert line.startswith(f"continues from step {STEPS} of {directory}; changed since: ")
    assert "schedule.lr 0.001 -> 0.0001" in line
    assert f"training.num_steps {STEPS} -> {STEPS + 2}" in line
    other = ["--checkpoint.initialize-from", f"{directory}@{STEPS}", "--telemetry.console", "quiet"]
    code, output = finish(start(arguments_for(corpus, tmp_path / "other", *other, steps=1)))
    assert (code, output) == (0, "")
    other = ["--checkpoint.initialize-from", directory]
    code, output = finish(start(arguments_for(corpus, tmp_path / "third", *other, steps=1)))
    expected = f"starts from the weights of {directory}/checkpoints/step-{STEPS + 2:08d}"
    assert expected in lines_of(output)


def test_on_a_terminal_the_newest_step_is_one_line_of_80_columns(corpus, tmp_path):
    code, screen = on_a_terminal([*TRAINER, *arguments_for(corpus, tmp_path / "run")])
    assert code == 0
    lines = [line for line in screen if not re.match(TIME, line)]
    # The wrapped ends of long lines, and the live line.
    live = [line for line in lines if line.startswith("step ")]
    assert len(live) == 1 and re.fullmatch(
        rf"step {STEPS}/{STEPS} \| [\d.]+ nats/token \| [\d,]+ tokens/s \| ETA 0:00:00 \| MFU \d+%", live[0]
    ), screen
    said = "\n".join(screen)
    assert "validation step 0/" in said and "saved " in said and "done: step" in said
    assert "train step" not in said


@pytest.mark.slow
def test_a_terminal_that_goes_away_ends_nothing(corpus, tmp_path):
    """In mid-line too: the run goes on to its end."""
    directory = tmp_path / "run"
    leader, follower = pty.openpty()
    environment = os.environ | CPU | {"TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, *map(str, (*TRAINER, *arguments_for(corpus, directory, steps=40)))]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=follower, stderr=follower)
    os.close(follower)
    seen = b""
    while b"step 1/" not in seen:
        seen += os.read(leader, 100)
    os.close(leader)
    assert process.wait(timeout=HANG_SECONDS) == 0
    assert max(entry["step"] for entry in read_metrics(directory)) == 40


@pytest.mark.parametrize(
    "streams",
    ["2>&1 | head -1", slow("> /dev/full 2>&1"), slow(">&- 2>&-")],
)
def test_a_run_whose_output_is_lost_saves_as_usual(corpus, tmp_path, streams):
    """Also under torchrun, and when a signal stops it."""
    directory = tmp_path / "run"
    words = shlex.join(map(str, ["examples/torchrun/train.sh", *arguments_for(corpus, directory)[1:]]))
    environment = os.environ | CPU | {"PYTHON": sys.executable}
    subprocess.run(["bash", "-c", f"{words} {streams}"], cwd=ROOT, env=environment, timeout=HANG_SECONDS)
    assert (directory / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").is_file()


DIRECTORIES = {
    "a file": (lambda path: path.write_text("x"), r"directory: \S+run is a file"),
    "another program's record": (
        lambda path: (path.mkdir(), (path / "run.json").write_text('{"id": 1}')),
        r"run\.json is not a run's of this program",
    ),
    "another program's checkpoints": (
        lambda path: (path.mkdir(), (path / "checkpoints").write_text("x")),
        r"checkpoints is a file; take another directory",
    ),
    "below a file": (
        lambda path: path.parent.joinpath("f").write_text("x"),
        r"directory: \S+: cannot be written",
    ),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_that_cannot_be_the_run_s_is_one_line(corpus, tmp_path, name):
    make, message = DIRECTORIES[name]
    make(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    directory = tmp_path / ("f/run" if name == "below a file" else "run")
    code, output = finish(start(arguments_for(corpus, directory)))
    assert code == 2 and re.search(message, output.splitlines()[-1]) and "Traceback" not in output, output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("unshare"), reason="root may write everywhere")
def test_a_read_only_directory_is_one_line(corpus, tmp_path):
    """Mounted read-only for root, whom no permission stops."""
    directory = tmp_path / "run"
    directory.mkdir()
    words = shlex.join(map(str, [sys.executable, *TRAINER, *arguments_for(corpus, directory)]))
    mount = f"mount --bind {directory} {directory} && mount -o remount,ro,bind {directory} && {words}"
    command = ["unshare", "--mount", "bash", "-c", mount]
    if os.geteuid() != 0:
        directory.chmod(0o500)
        command = ["bash", "-c", words]
    finished = subprocess.run(
        command, cwd=ROOT, env=os.environ | CPU, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    if "unshare" in finished.stderr or "mount:" in finished.stderr:
        pytest.skip(finished.stderr.strip())
    assert finished.returncode == 2 and "cannot be written: Read-only" in finished.stderr, finished.stderr


def run_script(corpus, directory, *more, steps=STEPS, **environment):
    """examples/torchrun/train.sh on two processes."""
    words = ["examples/torchrun/train.sh", *arguments_for(corpus, directory, *more, steps=steps)[1:]]
    usual = {"PYTHON": sys.executable, "GPUS_PER_NODE": "2"}
    return subprocess.Popen(
        [*map(str, words)],
        cwd=ROOT,
        env=os.environ | CPU | usual | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_stopped_under_torchrun_a_run_says_so_once(corpus, tmp_path):
    directory = tmp_path / "run"
    process = run_script(corpus, directory, steps=10**6)
    wait_for_step(process, directory, 3)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    stopped = max(entry["step"] for entry in read_metrics(directory))
    assert code == 3 and output.count("SIGTERM: saving and stopping") == 1, output
    assert output.count(f"saved step {stopped} of 1000000 after ") == output.count("exit code 3") == 1, output
    # Nothing else, such as torchrun's own lines of workers that end.
    assert lines_of(output)[-1].startswith("saved step "), output


def test_what_cannot_run_is_said_in_one_line_under_torchrun(corpus, tmp_path):
    for more, expected in (
        (["--training.micro-batch-size", "7"], "training.global_batch_size: "),
        (["--data.train", tmp_path / "nowhere"], "nowhere"),
    ):
        code, output = finish(run_script(corpus, tmp_path / "run", *more))
        assert code == 2 and len(output.splitlines()) == 1 and expected in output, output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_plain_torchrun_s_summary_has_the_error(corpus, tmp_path):
    words = arguments_for(corpus, tmp_path / "run", "--data.train", tmp_path / "nowhere")
    code, output = finish(start(words, processes=2))
    summary = output[output.index("Root Cause") :]
    assert code == 1 and f"data: {tmp_path}/nowhere.json: no such file" in summary, output


@pytest.mark.slow
def test_under_torchrun_failures_end_in_one_line_with_their_code(corpus, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, output = finish(run_script(corpus, tmp_path / "run", MASTER_PORT=port))
    assert code == 1 and f"MASTER_PORT: {port} is in use" in output and "Traceback" not in output, output
    directory = tmp_path / "killed"
    process = run_script(corpus, directory, steps=10**6)
    wait_for_step(process, directory, 1)
    import psutil

    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == "1" and child.ppid() == process.pid:
            child.kill()
    code, output = finish(process)
    assert code == 137 and "torchrun: error: rank 1 was ended by SIGKILL" in output, output


@pytest.mark.slow
@pytest.mark.skipif(find_mpirun() is None, reason="mpirun is not installed")
def test_under_mpirun_lines_are_plain(corpus, tmp_path):
    """Open MPI gives its processes terminals."""
    flags = "--allow-run-as-root --oversubscribe"
    environment = os.environ | CPU | {"PYTHON": sys.executable, "NUM_PROCESSES": "2", "MPIRUN_FLAGS": flags}
    environment |= {"PATH": os.path.dirname(find_mpirun()) + ":" + os.environ["PATH"]}
    finished = subprocess.run(
        ["examples/mpi/train.sh", *map(str, arguments_for(corpus, tmp_path / "run")[1:])],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "\x1b" not in finished.stdout
    assert lines_of(finished.stdout.replace("\r", ""))[-1].startswith("done: ")


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "4",
}


def lonely(corpus, directory, *more, rank=0):
    """One rank of four, whose peers do not come."""
    environment = SLURM | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "MASTER_PORT": str(free_port())}
    return start_interpreter(*TRAINER, *arguments_for(corpus, directory, *more), **environment)


def wait_for_line(process, text, seconds=HANG_SECONDS):
    """Read what a process prints up to a line with `text`."""
    seen, deadline = "", time.monotonic() + seconds
    while text not in seen and time.monotonic() < deadline:
        line = process.stdout.readline()
        if not line:
            break
        seen += line
    assert text in seen, seen
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_wait_for_other_ranks_is_told_and_ended_by_signals(corpus, tmp_path, number):
    process = lonely(corpus, tmp_path / "run", "--training.micro-batch-size", "2")
    wait_for_line(process, "warning: waiting for ranks 1, 2, 3 of 4 to come to 127.0.0.1:")
    if number == signal.SIGTERM:
        process.send_signal(signal.SIGUSR2)
        wait_for_line(process, "in _meet")
    process.send_signal(number)
    code, output = finish(process, seconds=10)
    name = signal.Signals(number).name
    assert code == 3 and f"{name} before the first step: ends with exit code 3" in output, output


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_a_wait_for_other_ranks_ends_in_one_line(corpus, tmp_path, rank):
    limit = ["--parallel.collective-timeout-seconds", "6", "--training.micro-batch-size", "2"]
    code, output = finish(lonely(corpus, tmp_path / "run", *limit, rank=rank))
    last = output.splitlines()[-1]
    whom = "ranks 1, 2, 3 of 4" if rank == 0 else "rank 0 at 127.0.0.1:"
    assert code == 4 and "Traceback" not in output, output
    assert f"collective_timeout_seconds: after 6 s still waiting for {whom}" in last, output
