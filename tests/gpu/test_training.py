"""Training on a GPU is training on the CPU, up to rounding, whatever brings the batches."""

import pytest

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.devices import DEVICE
from tests.helpers.gpu_runs import DEVICE_WORDS, curve
from tests.helpers.runs import arguments_for
from tests.helpers.skips import needs_dali


@pytest.mark.parametrize("family", OBJECTIVES)
def test_losses_are_those_on_the_cpu(verbs, verbs_on_cpu, corpus, tmp_path, family):
    recipe = f"examples/{family}/tiny.py"
    for process, name in ((verbs, "device"), (verbs_on_cpu, "cpu")):
        words = arguments_for(corpus, tmp_path / name, recipe=recipe, steps=4)
        process.run(*words, "--parallel.device", process.device, seconds=120)
    ours, theirs = curve(tmp_path / "device"), curve(tmp_path / "cpu")
    for (fingerprint, loss), (expected_fingerprint, expected) in zip(ours, theirs, strict=True):
        assert fingerprint == expected_fingerprint
        # Transformer Engine multiplies fp32 in TF32.
        assert loss == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def plain_curve(verbs, corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    verbs.run(*arguments_for(corpus, directory, steps=6), *DEVICE_WORDS, "--parallel.deterministic")
    return curve(directory)


def train_with(verbs, corpus, directory, *words):
    words = arguments_for(corpus, directory, *words, steps=6)
    assert verbs.run(*words, *DEVICE_WORDS, "--parallel.deterministic", seconds=120)[0] == 0
    return curve(directory)


@pytest.mark.parametrize(
    "words",
    [("--data.loader", "pinned"), ("--data.workers", 2), ("--data.loader", "pinned", "--data.workers", 2)],
    ids=["pinned", "workers", "both"],
)
def test_every_loader_brings_the_same(verbs, corpus, tmp_path, plain_curve, words):
    assert train_with(verbs, corpus, tmp_path, *words) == plain_curve


@needs_dali
def test_dali_brings_the_same(verbs, corpus, tmp_path, plain_curve):
    assert train_with(verbs, corpus, tmp_path, "--data.loader", "dali", "--data.workers", 2) == plain_curve


def test_texts_written_meanwhile_change_nothing(verbs, corpus, tmp_path, plain_curve):
    words = ("--generation.every", 4, "--generation.num-samples", 2, "--generation.sampling.num-steps", 4)
    assert train_with(verbs, corpus, tmp_path, *words) == plain_curve
    assert len((tmp_path / "texts" / "step-00000004.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(DEVICE == "cpu", reason="a GPU's energy")
def test_power_is_that_of_a_gpu(verbs, corpus, tmp_path):
    pytest.importorskip("pynvml")
    # An evaluation lies between the lines.
    train_with(verbs, corpus, tmp_path, "--telemetry.energy", "--evaluation.every", 3)
    lines = [entry for entry in read_metrics(tmp_path) if entry["kind"] == "train"]
    assert all(line["joules_per_token"] >= 0 and 0 <= line["watts_per_device"] < 1500 for line in lines)
    assert sum(line["watts_per_device"] for line in lines) > 0
