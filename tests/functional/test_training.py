"""Training as a user runs it: processes, signals, kills, resumes, starts from other weights."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.conftest import ROOT

STEPS = 14


def arguments_for(corpus, directory, *more, recipe="examples/mdlm/tiny.py", steps=STEPS):
    shape = ["--model.num-layers", 2, "--model.hidden-size", 32, "--model.num-attention-heads", 2]
    return [
        *("train", recipe, "--directory", directory),
        *("--data.train", corpus.train, "--data.validation", corpus.validation, "--data.seq-length", 32),
        *shape,
        *("--model.ffn-hidden-size", 64, "--training.num-steps", steps, "--telemetry.log-every", 1),
        *("--training.micro-batch-size", 4, "--schedule.decay-steps", 100),
        *("--evaluation.every", 1000, "--evaluation.num-batches", 1, "--evaluation.batch-size", 8),
        *("--checkpoint.save-every", 4, "--checkpoint.keep-last", 0),
        *more,
    ]


def torchrun(processes):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def start(arguments, processes=1):
    launcher = torchrun(processes) if processes > 1 else []
    words = [sys.executable, *launcher, "-m", "megatron_dlm", *map(str, arguments)]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process, directory, step, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if max((entry["step"] for entry in read_metrics(directory)), default=0) >= step:
            return
        time.sleep(0.02)
    output, _ = process.communicate(timeout=10)
    pytest.fail(f"step {step} was not reached; exit code {process.returncode}\n{output}")


def finish(process, seconds=120):
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def train_metrics(directory):
    """Everything a step reports except its speed."""
    timing = {"tokens_per_second", "eta_seconds", "tflops_per_second_per_device", "mfu"}
    return {
        entry["step"]: {k: v for k, v in entry.items() if k not in timing}
        for entry in read_metrics(directory)
        if entry["kind"] == "train"
    }


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    code, output = finish(start(arguments_for(corpus, directory)))
    assert code == 0, output
    return directory, output


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


def tensor_files(directory):
    """The bytes of all tensors, optimizer state included, of the last checkpoint."""
    files = (directory / "checkpoints" / f"step-{STEPS:08d}").glob("*.distcp")
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
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


@pytest.mark.parametrize("name", ["run.json", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_named_and_gone_behind_only_on_request(corpus, tmp_path, uninterrupted, name):
    directory = tmp_path / "run"
    shutil.copytree(
        uninterrupted[0] / "checkpoints" / "step-00000008", directory / "checkpoints" / "step-00000008"
    )
    shutil.copytree(
        uninterrupted[0] / "checkpoints" / "step-00000012", directory / "checkpoints" / "step-00000012"
    )
    damaged = directory / "checkpoints" / "step-00000012" / name
    content = bytearray(damaged.read_bytes())
    if name == "run.json":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    code, output = finish(start(arguments_for(corpus, directory)))
    assert code == 2 and str(damaged) in output, output
    code, output = finish(start(arguments_for(corpus, directory, "--checkpoint.on-corrupt", "previous")))
    assert code == 0 and f"going back to {directory}/checkpoints/step-00000008" in output, output
    assert min(train_metrics(directory)) == 9
    assert tensor_files(directory) == tensor_files(uninterrupted[0])


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


def test_checkpoints_are_listed_inspected_verified_and_pruned(corpus, tmp_path, uninterrupted, command):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    listed = command("checkpoint", "list", run).stdout
    assert [line.split()[0] for line in listed.splitlines()[1:]] == [
        f"step-{step:08d}" for step in (4, 8, 12, 14)
    ]
    newest = run / "checkpoints" / "step-00000014"
    inspected = command("checkpoint", "inspect", newest).stdout
    assert "step 14 of 14, 112 samples" in inspected and "MDLMConfig(" in inspected
    assert "  block.layers.mlp.linear_fc1.weight  float32 [2, 64, 32]" in inspected
    assert "all as in the manifest" in command("checkpoint", "verify", newest).stdout
    (newest / "progress.json").write_text("{}")
    finished = command("checkpoint", "verify", newest, check=False)
    assert finished.returncode == 2 and "progress.json" in finished.stderr
    prune = ["checkpoint", "prune", run, "--keep-last", 1, "--keep-every", 8]
    assert command(*prune, "--dry-run").stdout.count("would remove") == 2
    assert command(*prune).stdout.count("removed") == 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000014"]
    for wrong, message in (
        (["prune", run, "--keep-last", 0], "keep_last: 0 is below 1"),
        (["list", tmp_path], "has no directory checkpoints"),
        (["show", run], "'show' is not one of list, inspect, verify, prune"),
    ):
        finished = command("checkpoint", *wrong, check=False)
        assert finished.returncode == 2 and message in finished.stderr


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


@pytest.fixture
def copied(uninterrupted, tmp_path):
    """A copy of the finished run that a test may damage."""
    target = tmp_path / "copy"
    shutil.copytree(uninterrupted[0], target)
    return target


def test_a_flipped_byte_stops_the_resume_naming_the_file(corpus, copied):
    file = sorted((copied / "checkpoints" / "step-00000014").glob("*.distcp"))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    code, output = finish(start(arguments_for(corpus, copied, steps=16)))
    assert code == 2 and str(file) in output and "SHA-256 differs" in output
    assert "Traceback" not in output


def test_a_half_written_checkpoint_is_passed_over(corpus, copied):
    last = copied / "checkpoints" / "step-00000014"
    last.rename(last.with_name("step-00000014.tmp"))
    code, output = finish(start(arguments_for(corpus, copied, steps=13)))
    assert code == 0, output
    assert "train step 13/13" in output and "train step 12/" not in output


REFUSED = {
    "architecture": (["--model.num-layers", 3], "model.num_layers: 3 differs from 2 in checkpoint"),
    "seed": (["--training.seed", 5], "training.seed: 5 differs from 1"),
    "length": (["--data.seq-length", 16], "data.seq_length: 16 differs from 32"),
    "precision": (["--training.precision", "bf16"], "training.precision: bf16 differs from fp32"),
    "optimizer": (
        ["--parallel.no-use-distributed-optimizer"],
        "parallel.use_distributed_optimizer: False differs from True",
    ),
    "loss": (["--objective.loss", "elbo"], "objective.loss: elbo differs from low-variance"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_run_is_not_continued(corpus, copied, name):
    changes, message = REFUSED[name]
    code, output = finish(start(arguments_for(corpus, copied, *changes)))
    assert code == 2 and message in output and len(output.strip().splitlines()) == 1, output


def test_other_data_is_not_continued(command, corpus, copied, tmp_path):
    from tests.helpers import tiny

    text = tiny.write_jsonl(tmp_path / "t.jsonl", tiny.sentences(400, seed=77))
    command("index", "--input", text, "--output", tmp_path / "other", "--tokenizer", corpus.tokenizer)
    code, output = finish(start(arguments_for(corpus, copied, "--data.train", tmp_path / "other")))
    assert code == 2 and "data.train: tokens: " in output


def test_another_tokenizer_of_the_same_size_is_refused(command, corpus, copied, tmp_path):
    from tests.helpers import tiny

    text = tiny.write_jsonl(tmp_path / "t.jsonl", [s[::-1] for s in tiny.sentences(400, seed=7)])
    command("tokenizer", "train", "--input", text, "--output", tmp_path / "tok", "--vocab-size", 301)
    command("index", "--input", text, "--output", tmp_path / "other", "--tokenizer", tmp_path / "tok")
    more = ["--data.train", tmp_path / "other", "--data.validation", tmp_path / "other"]
    more += ["--checkpoint.initialize-from", copied / "checkpoints" / "step-00000014"]
    code, output = finish(start(arguments_for(corpus, tmp_path / "run", *more)))
    assert code == 2 and "data.train: tokenizer: " in output


def test_the_record_of_a_run_is_a_recipe(command, copied):
    record = copied / "checkpoints" / "step-00000014" / "run.json"
    out = command("train", record, "--dry-run", 1).stdout
    assert "objective  mdlm" in out and str(copied.parent) not in out


def test_another_family_is_not_continued(corpus, copied):
    code, output = finish(start(arguments_for(corpus, copied, recipe="examples/ar/tiny.py")))
    assert code == 2 and "objective: ARConfig differs from MDLMConfig" in output


def test_weights_only_start_is_fresh_in_all_else(corpus, tmp_path, uninterrupted):
    directory = tmp_path / "phase2"
    source = uninterrupted[0] / "checkpoints" / "step-00000014"
    more = ["--checkpoint.initialize-from", source, "--schedule.lr", 5e-4]
    code, output = finish(start(arguments_for(corpus, directory, *more, steps=2)))
    assert code == 0, output
    first = read_metrics(directory)[0]
    assert first["kind"] == "validation" and first["step"] == 0
    metrics = train_metrics(directory)
    assert list(metrics) == [1, 2] and metrics[1]["consumed_samples"] == 8
    assert metrics[1]["lr"] == pytest.approx(5e-4 / 20)
    whole = [entry for entry in read_metrics(uninterrupted[0]) if entry["kind"] == "validation"]
    assert first["nats_per_token"] == whole[-1]["nats_per_token"] != whole[0]["nats_per_token"]


def test_a_start_that_is_no_checkpoint(corpus, tmp_path):
    more = ["--checkpoint.initialize-from", tmp_path]
    code, output = finish(start(arguments_for(corpus, tmp_path / "run", *more)))
    assert code == 2 and "not a complete checkpoint" in output
    assert not (tmp_path / "run").exists()


def test_a_bad_token_found_while_running_is_one_line(corpus, tmp_path):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus.train}{suffix}", tmp_path / f"train{suffix}")
    data = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(b"\xff\xff" * (len(data) // 2))
    more = ["--data.train", tmp_path / "train"]
    code, output = finish(start(arguments_for(corpus, tmp_path / "run", *more)))
    assert code == 2 and "token id 65535 is outside [0, 301)" in output and "Traceback" not in output
