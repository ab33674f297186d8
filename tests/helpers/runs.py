"""Training runs as a user starts them, and what they leave."""

import os
import subprocess
import sys
import time

import psutil
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


def torchrun(processes, options=()):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *options]


def start(arguments, processes=1, options=(), rank=None, world_size=None, port=None, environment=None):
    """A run under torchrun, or alone, or as one of the ranks that another launcher would start."""
    place = {}
    if rank is not None:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        place = {name: str(value) for name, value in (numbers | {"MASTER_PORT": port}).items()}
    launcher = torchrun(processes, options) if processes > 1 else []
    words = [sys.executable, *launcher, "-m", "megatron_dlm", *map(str, arguments)]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | place | (environment or {}),
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


def tensor_files(directory):
    """The bytes of all tensors, optimizer state included, of the last checkpoint."""
    files = (directory / "checkpoints" / f"step-{STEPS:08d}").glob("*.distcp")
    return {path.name: path.read_bytes() for path in files}


def save(session, step):
    """A checkpoint of a session, at once; all ranks call it."""
    from megatron_dlm.checkpointing.manager import PendingSave
    from megatron_dlm.checkpointing.storage import CheckpointRoot
    from megatron_dlm.checkpointing.writing import SavePlans

    root = CheckpointRoot(session.config.directory)
    model = (session.denoiser, session.optimizer, session.parallel)
    PendingSave(root, step, *model, SavePlans(session.parallel), {"a.json": 1}, timeout_seconds=60).finish()
