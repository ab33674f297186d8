"""Training runs as a user starts them, and what they leave."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from megatron_dlm.telemetry.writers import METRICS_FILE, read_metrics
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT
from tests.helpers.processes import CPU, TRAINER, Program
from tools.ports import free_port

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


def torchrun(processes, options=()):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *options]


def start(arguments, processes=1, options=()):
    """A run alone, or under torchrun."""
    if processes > 1:
        return start_interpreter(*torchrun(processes, options), *TRAINER, *arguments)
    return Program(*TRAINER, *arguments, together=True)


def start_ranks(arguments, world_size, own=((),)):
    """One run as another launcher than torchrun would start it: a process a rank and nobody above them.

    `own` are further arguments of each rank, taken in turn.
    """
    port = free_port()
    started = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        environment = {name: str(value) for name, value in (place | {"MASTER_PORT": port}).items()}
        words = (*arguments, *own[rank % len(own)])
        started.append(Program(*TRAINER, *words, together=True, environment=environment))
    return started


def finish_ranks(arguments, world_size):
    """Start a run's ranks and wait for them; the first exit code that is not 0, and what all have printed."""
    ended = [finish(process) for process in start_ranks(arguments, world_size)]
    return next((code for code, _ in ended if code), 0), "".join(output for _, output in ended)


def start_interpreter(*words, **environment):
    """`python WORDS` in an interpreter of its own, which imports all by itself."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | CPU | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def rank_process(launcher, rank):
    """The training process of one rank under torchrun."""
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if "megatron_dlm" in child.cmdline() and child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"rank {rank} is not there")


def wait_for_step(process, directory, step, seconds=HANG_SECONDS):
    """Wait until a run has reached a step; it hangs when it writes no metrics for `seconds`."""
    path, size = directory / METRICS_FILE, 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        # A long run's metrics are read again only when there are more.
        if path.exists() and (now := path.stat().st_size) != size:
            size, deadline = now, time.monotonic() + seconds
            if max((entry["step"] for entry in read_metrics(directory)), default=0) >= step:
                return
        time.sleep(0.02)
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for hanging in (*parent.children(recursive=True), parent):
            hanging.kill()
    output, _ = process.communicate(timeout=10)
    pytest.fail(f"step {step} was not reached; exit code {process.returncode}\n{output}")


def finish(process, seconds=HANG_SECONDS):
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


OF_THE_MACHINE = {
    *("tokens_per_second", "tokens_per_second_per_device", "tflops_per_second_per_device", "mfu"),
    *("eta_seconds", "time", "step_seconds_median", "step_seconds_p95", "data_wait_seconds", "memory_gib"),
    *("rank_seconds_median", "rank_seconds_max", "slowest_rank", "joules_per_token", "watts_per_device"),
}
"""Metrics that two equal runs need not share."""


def without_speed(entry):
    """Everything a line of metrics has except what depends on the clock and the machine."""
    return {name: value for name, value in entry.items() if name not in OF_THE_MACHINE}


def train_metrics(directory):
    """Everything a training step reports except its speed."""
    entries = [entry for entry in read_metrics(directory) if entry["kind"] == "train"]
    return {entry["step"]: without_speed(entry) for entry in entries}


def tensor_files(directory):
    """The bytes of all tensors, optimizer state included, of the last checkpoint."""
    files = (directory / "checkpoints" / f"step-{STEPS:08d}").glob("*.distcp")
    return {path.name: path.read_bytes() for path in files}


def save(session, step):
    """A checkpoint of a session, at once; all ranks call it."""
    from megatron_dlm.checkpointing.async_writer import SavePlans
    from megatron_dlm.checkpointing.layout import CheckpointRoot
    from megatron_dlm.checkpointing.manager import PendingSave

    root = CheckpointRoot(session.config.directory)
    model = (session.denoiser, session.optimizer, session.parallel)
    PendingSave(root, step, *model, SavePlans(session.parallel), {"a.json": 1}, timeout_seconds=60).finish()
