"""Runs of every family from an AR model's weights, and the comparison of its ways."""

import csv
import subprocess
import sys

import pytest

from megatron_dlm.checkpointing.full_weights import FullWeights
from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.run.run_record import read_run_record
from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.paths import ROOT
from tests.helpers.runs import arguments_for

SCRIPT = ROOT / "examples" / "ar-to-diffusion" / "compare.py"


@pytest.fixture(scope="module")
def ar(command, corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ar")
    command(*arguments_for(corpus, directory, recipe="examples/ar/tiny.py", steps=4))
    return directory


def weights_of(directory, step):
    checkpoint = directory / "checkpoints" / f"step-{step:08d}"
    record = read_run_record(checkpoint)
    full = FullWeights(checkpoint, record.config.model, record.vocabulary.size)
    return full.read(full.shapes)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in OBJECTIVES if family != "ar"])
def test_every_weight_is_the_ar_model_s(command, corpus, ar, tmp_path, family):
    """After a step at a rate of nothing: families differ in what they read and score, not in the network."""
    start = ["--checkpoint.initialize-from", ar, "--schedule.lr", 1e-30, "--schedule.min-lr", 0]
    if "lookahead" in OBJECTIVES[family].can_change:
        start += ["--objective.schedules", "lookahead 0:0 2"]
    recipe = f"examples/{family}/tiny.py"
    command(*arguments_for(corpus, tmp_path, *start, "--optimizer.weight-decay", 0, recipe=recipe, steps=4))
    theirs, ours = weights_of(ar, 4), weights_of(tmp_path, 4)
    assert theirs.keys() == ours.keys()
    assert all((theirs[name] == ours[name]).all() for name in theirs)
    values = [entry for entry in read_metrics(tmp_path) if entry["kind"] == "train"]
    assert len(values) == 4


@pytest.mark.slow
def test_the_ways_are_compared_at_equal_tokens(corpus, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for part, prefix in (("train", corpus.train), ("held-out", corpus.validation)):
        for suffix in (".bin", ".idx", ".json"):
            source = prefix.with_name(prefix.name + suffix)
            text = source.read_bytes().replace(source.stem.encode() + b".", part.encode() + b".")
            (data / f"{part}{suffix}").write_bytes(text if suffix == ".json" else source.read_bytes())
    words = [sys.executable, SCRIPT, tmp_path / "work", "--data", data, "--ar-steps", 60, "--steps", 60]
    told = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=ROOT)
    assert told.returncode == 0, told.stdout + told.stderr
    with (tmp_path / "work" / "recovery.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    variants = {row["variant"] for row in rows}
    assert len(variants) == 5 and all(float(row["nats_per_token"]) > 0 for row in rows)
    assert {row["tokens"] for row in rows if row["step"] == "60"} == {str(60 * 16 * 128)}
    assert (tmp_path / "work" / "recovery.png").stat().st_size > 10_000
    refused = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert refused.returncode == 2 and "--data" in refused.stderr
