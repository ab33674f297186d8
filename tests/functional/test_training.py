"""Training as a user runs it: processes, signals, kills."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.paths import ROOT
from tests.helpers.processes import CPU
from tests.helpers.runs import STEPS, arguments_for, finish, start, tensor_files, train_metrics, wait_for_step
from tools.ports import free_port


def test_a_run_reports_and_saves(uninterrupted):
    directory, output = uninterrupted
    metrics = train_metrics(directory)
    assert list(metrics) == list(range(1, STEPS + 1))
    assert f"train step {STEPS}/{STEPS}" in output
    for word in ("loss", "nats/token", "tokens/s", "ETA", "MFU", "validation step 0"):
        assert word in output
    saved = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert saved == ["step-00000004", "step-00000008", "step-00000012", "step-00000014"]
    assert list((directory / "tensorboard").iterdir())
    assert metrics[STEPS]["nats_per_token"] < metrics[1]["nats_per_token"]
    assert all(entry["mfu"] > 0 for entry in read_metrics(directory) if entry["kind"] == "train")


def test_tensorboard_holds_the_curve(uninterrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(uninterrupted[0] / "tensorboard")).Reload()
    points = events.Scalars("train/nats_per_token")
    assert [point.step for point in points] == list(range(1, STEPS + 1))
    assert "validation/nats_per_token" in events.Tags()["scalars"]


def test_killed_and_resumed_equals_uninterrupted(corpus, tmp_path, uninterrupted):
    directory = tmp_path / "run"
    process = start(arguments_for(corpus, directory))
    wait_for_step(process, directory, 6)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, output = finish(start(arguments_for(corpus, directory)))
    assert code == 0, output
    assert train_metrics(directory) == train_metrics(uninterrupted[0])
    assert tensor_files(directory) == tensor_files(uninterrupted[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_exits_with_3(corpus, tmp_path, uninterrupted, number):
    directory = tmp_path / "run"
    process = start(arguments_for(corpus, directory))
    wait_for_step(process, directory, 5)
    # Launchers deliver one signal twice: to the process and to its group.
    process.send_signal(number)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 3, output
    stopped = max(train_metrics(directory))
    assert (directory / "checkpoints" / f"step-{stopped:08d}").is_dir()
    if number == signal.SIGTERM:
        code, output = finish(start(arguments_for(corpus, directory)))
        assert code == 0, output
        assert train_metrics(directory) == train_metrics(uninterrupted[0])


@pytest.mark.slow
def test_nohup_outlives_its_terminal(corpus, tmp_path):
    """The launcher too: torchrun would forward the signal."""
    words = ["nohup", "examples/torchrun/train.sh", *arguments_for(corpus, tmp_path / "run")[1:]]
    environment = os.environ | CPU | {"PYTHON": sys.executable, "MASTER_PORT": str(free_port())}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, words)), cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for_step(process, tmp_path / "run", 3)
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(90) == 0, (tmp_path / "log").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert max(train_metrics(tmp_path / "run")) == STEPS


def test_a_time_limit_saves_and_exits_with_3(corpus, tmp_path):
    limit = ["--checkpoint.stop-after-minutes", 1e-6]
    code, output = finish(start(arguments_for(corpus, tmp_path, *limit)))
    assert code == 3, output
    assert (tmp_path / "checkpoints" / "step-00000001").is_dir()


def test_a_file_asks_for_a_checkpoint(corpus, tmp_path):
    tmp_path.joinpath("save-now").touch()
    code, output = finish(start(arguments_for(corpus, tmp_path, steps=3)))
    assert code == 0, output
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000003",
    ]
    assert not (tmp_path / "save-now").exists()


def test_a_signal_to_one_of_two_ranks_stops_both(corpus, tmp_path):
    import psutil

    directory = tmp_path / "run"
    process = start(arguments_for(corpus, directory, steps=2000), processes=2)
    wait_for_step(process, directory, 3)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "megatron_dlm" in " ".join(child.cmdline())
        and "torch.distributed.run" not in " ".join(child.cmdline())
    ]
    assert len(workers) >= 2
    rank_1 = next(child for child in workers if child.environ().get("RANK") == "1")
    rank_1.send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code != 0 and "exitcode  : 3" in output, output
    stopped = max(train_metrics(directory))
    assert (directory / "checkpoints" / f"step-{stopped:08d}").is_dir()


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(corpus, tmp_path):
    """torchrun sends the signal to every process of its workers' groups, helpers of a save included."""
    directory = tmp_path / "run"
    process = start(arguments_for(corpus, directory, steps=2000), processes=2)
    wait_for_step(process, directory, 6)  # a save has happened before
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code != 0
    stopped = max(train_metrics(directory))
    assert (directory / "checkpoints" / f"step-{stopped:08d}").is_dir(), output
    assert "BrokenPipeError" not in output
    assert [path.name for path in (directory / "checkpoints").glob("*.tmp")] == []


def test_a_bad_token_found_while_running_is_one_line(corpus, tmp_path):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus.train}{suffix}", tmp_path / f"train{suffix}")
    data = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(b"\xff\xff" * (len(data) // 2))
    more = ["--data.train", tmp_path / "train"]
    code, output = finish(start(arguments_for(corpus, tmp_path / "run", *more)))
    assert code == 2 and "token id 65535 is outside [0, 301)" in output and "Traceback" not in output


def test_secrets_of_the_environment_stay_there(command, corpus, tmp_path):
    secrets = {name: f"secret-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
    finished = command(
        *arguments_for(corpus, tmp_path, "--training.max-skipped-steps", 1, steps=3), **secrets
    )
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    written += [finished.stdout.encode(), finished.stderr.encode()]
    assert len(written) > 8
    assert not any(secret.encode() in text for secret in secrets.values() for text in written)


@pytest.mark.slow
def test_deterministic_kernels_give_equal_runs(corpus, tmp_path, uninterrupted):
    """Some add in another order than the default ones, so only these two runs are equal in all bits."""
    logs = []
    for name in ("first", "second"):
        arguments = arguments_for(corpus, tmp_path / name, "--parallel.deterministic", steps=5)
        code, output = finish(start(arguments))
        assert code == 0, output
        logs.append(train_metrics(tmp_path / name))
    assert logs[0] == logs[1]
    default = train_metrics(uninterrupted[0])
    for step, entry in logs[0].items():
        assert entry["fingerprint"] == default[step]["fingerprint"]
        assert entry["loss"] == pytest.approx(default[step]["loss"], rel=1e-5)
