"""Checkpoints of a GPU's run: whole after a kill, saved at a signal, and a resume that changes no bit."""

import os
import signal
import time

import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.devices import HAS_CUDA
from tests.helpers.gpu_runs import DEVICE_WORDS, curve
from tests.helpers.processes import TRAINER
from tests.helpers.runs import arguments_for, finish, start_interpreter, tensor_files, train_metrics

WORDS = (*DEVICE_WORDS, "--parallel.deterministic", "--training.precision", "bf16")
STEPS = 14
"""Of `arguments_for`; a save every 4."""
WAYS = {"synchronous": (), "asynchronous": ("--checkpoint.async-save",)}


@pytest.fixture(scope="module")
def whole(verbs, corpus, tmp_path_factory):
    """A run that nothing has stopped."""
    directory = tmp_path_factory.mktemp("whole")
    assert verbs.run(*arguments_for(corpus, directory, *WORDS), seconds=120)[0] == 0
    return directory


@pytest.mark.parametrize("way", WAYS)
def test_a_save_goes_on_bit_for_bit(verbs, corpus, tmp_path, whole, way):
    for steps in (8, STEPS):
        words = arguments_for(corpus, tmp_path, *WORDS, *WAYS[way], steps=steps)
        assert verbs.run(*words, seconds=120)[0] == 0
    assert curve(tmp_path) == curve(whole)
    assert tensor_files(tmp_path) == tensor_files(whole)


def started(corpus, directory, *words, steps=STEPS):
    """A process of its own, which sees the GPU."""
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")} if HAS_CUDA else {}
    arguments = arguments_for(corpus, directory, *WORDS, *words, steps=steps)
    return start_interpreter(*TRAINER, *arguments, **visible)


def wait_until(process, condition, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if condition():
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"not reached; {process.communicate()[0][-2000:]}")


def test_a_killed_run_goes_on_bit_for_bit(verbs, corpus, tmp_path, whole):
    """Killed behind the second save, whenever that is; what was logged twice is the same twice."""
    process = started(corpus, tmp_path, steps=STEPS)
    try:
        wait_until(process, lambda: (tmp_path / "checkpoints" / "step-00000008").is_dir())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert verbs.run(*arguments_for(corpus, tmp_path, *WORDS), seconds=120)[0] == 0
    assert train_metrics(tmp_path) == train_metrics(whole)
    assert tensor_files(tmp_path) == tensor_files(whole)


def test_sigterm_saves_and_ends_with_3(corpus, tmp_path):
    process = started(corpus, tmp_path, steps=100_000)
    try:
        wait_until(process, lambda: max((e["step"] for e in read_metrics(tmp_path)), default=0) >= 6)
        process.send_signal(signal.SIGTERM)
        code, output = finish(process, seconds=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 3, output
    assert (tmp_path / "checkpoints" / f"step-{max(train_metrics(tmp_path)):08d}").is_dir(), output
