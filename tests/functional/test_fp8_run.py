"""A run in emulated FP8, by the command: training, resume, evaluation, export."""

import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.runs import STEPS, arguments_for, tensor_files

FP8 = ("--training.precision", "fp8", "--fp8.recipe", "delayed", "--fp8.amax-history-len", "3")


def losses(directory):
    return {
        entry["step"]: (entry["loss"], entry["grad_norm"])
        for entry in read_metrics(directory)
        if entry["kind"] == "train"
    }


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory, command):
    directory = tmp_path_factory.mktemp("fp8")
    command(*arguments_for(corpus, directory, *FP8, recipe="examples/duo/tiny.py", steps=STEPS))
    return directory


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_maxima_it_had(corpus, tmp_path, command, whole_run):
    """Bit for bit: the histories of delayed scaling are in the checkpoint."""
    for steps in (4, STEPS):
        command(*arguments_for(corpus, tmp_path, *FP8, recipe="examples/duo/tiny.py", steps=steps))
    assert losses(tmp_path) == losses(whole_run)
    assert tensor_files(tmp_path) == tensor_files(whole_run)
    inspected = command("checkpoint", "inspect", tmp_path / "checkpoints" / "step-00000014").stdout
    assert "linear_fc1.amax_history  float32 [2, 3, 3]" in inspected


@pytest.mark.slow
def test_it_starts_from_a_run_without_maxima(corpus, tmp_path, command, uninterrupted):
    start = ("--checkpoint.initialize-from", uninterrupted[0] / "checkpoints" / "step-00000014")
    command(*arguments_for(corpus, tmp_path, *start, *FP8, steps=1))
    assert 1 in losses(tmp_path)


@pytest.mark.slow
def test_its_checkpoint_is_evaluated_exported_and_started_from(corpus, tmp_path, command, whole_run):
    checkpoint = whole_run / "checkpoints" / "step-00000014"
    counts = ("--num-sequences", 4, "--num-times", 4, "--replicates", 1)
    command("evaluate", "nll", checkpoint, *counts, "--output", tmp_path / "nll.json")
    command("export", checkpoint, tmp_path / "export")
    for source, more in ((checkpoint, FP8), (checkpoint, ()), (tmp_path / "export", FP8)):
        directory = tmp_path / f"from-{source.name}-{len(more)}"
        start = ("--checkpoint.initialize-from", source)
        command(*arguments_for(corpus, directory, *start, *more, recipe="examples/duo/tiny.py", steps=1))
        assert 1 in losses(directory)
