"""Runs over blends: a changed one is refused unless named, and then goes on without repeating a sample."""

import json

import numpy as np
import pytest

from megatron_dlm.data.loading.blending import PlanSegment, SampleOrder
from megatron_dlm.data.loading.data_config import DataConfig
from megatron_dlm.platform.codec import decode
from megatron_dlm.platform.rng import NoiseSource
from megatron_dlm.run.datasets import open_data
from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.runs import arguments_for, finish, finish_ranks, start


def epochs(directory):
    entries = [entry for entry in read_metrics(directory) if entry["kind"] == "train"]
    return [{k: v for k, v in entry.items() if k.startswith("epochs/")} for entry in entries]


def test_a_blend_may_change_where_that_is_named(corpus, tmp_path):
    run = tmp_path / "run"
    code, output = finish(start(arguments_for(corpus, run, steps=4)))
    assert code == 0, output
    (first,) = epochs(run)[-1:]
    assert list(first) == ["epochs/train"]
    blend = ["--data.train", 1, corpus.train, 1, corpus.validation]
    code, output = finish(start(arguments_for(corpus, run, *blend, steps=8)))
    assert code == 2 and "--checkpoint.allow-changed data.train" in output, output
    # Shards and weights, not hashes alone.
    assert f"data.train: 1 {corpus.train} 1 {corpus.validation} (tokens " in output, output
    assert f" differs from {corpus.train} (tokens " in output, output
    blend += ["--checkpoint.allow-changed", "data.train"]
    code, output = finish(start(arguments_for(corpus, run, *blend, steps=8)))
    assert code == 0, output
    last = epochs(run)[-1]
    assert set(last) == {"epochs/train", "epochs/validation"}
    assert last["epochs/train"] > first["epochs/train"] and last["epochs/validation"] > 0
    progress = json.loads((run / "checkpoints" / "step-00000008" / "progress.json").read_text())
    assert [segment["first_sample"] for segment in progress["data_plan"]] == [0, 32]
    # Once more as it was: the same blend is no change.
    code, output = finish(start(arguments_for(corpus, run, *blend[:-2], steps=10)))
    assert code == 0, output
    progress = json.loads((run / "checkpoints" / "step-00000010" / "progress.json").read_text())
    assert [segment["first_sample"] for segment in progress["data_plan"]] == [0, 32]


# Steps up to, processes, micro-batch, workers, whether both shards are read.
LEGS = [(4, 1, 4, 0, False), (8, 2, 2, 2, False), (12, 2, 4, 0, True), (16, 1, 8, 1, True)]
ONE_LAYOUT = [(8, 1, 4, 0, False), (16, 1, 4, 0, True)]


def run_legs(corpus, directory, legs):
    """The fingerprint of every step, and the plan, of a run in several starts."""
    for steps, processes, micro_batch, workers, both in legs:
        blend = [1, corpus.train, 1, corpus.validation] if both else [corpus.train]
        layout = ["--training.micro-batch-size", micro_batch, "--data.workers", workers]
        allow = ["--checkpoint.allow-changed", "data.train"]
        more = ["--data.train", *blend, *layout, *allow]
        code, output = finish_ranks(arguments_for(corpus, directory, *more, steps=steps), processes)
        assert code == 0, output
    found = {e["step"]: e["fingerprint"] for e in read_metrics(directory) if e["kind"] == "train"}
    progress = json.loads((directory / "checkpoints" / "step-00000016" / "progress.json").read_text())
    return found, progress


@pytest.mark.slow
def test_batches_are_the_same_whatever_the_layout(corpus, tmp_path, record_property):
    """Processes, micro-batch, workers and blend change at resumes: the same global batches, bit for bit."""
    found, progress = run_legs(corpus, tmp_path / "legs", LEGS)
    expected, plain = run_legs(corpus, tmp_path / "plain", ONE_LAYOUT)
    assert found == expected and list(found) == list(range(1, 17))
    assert progress["data_plan"] == plain["data_plan"] and progress["consumed_samples"] == 128

    # The samples, block by block: none twice before a shard's end, none left out.
    config = DataConfig(
        train=("1", str(corpus.train), "1", str(corpus.validation)),
        validation=str(corpus.validation),
        seq_length=32,
    )
    blocks = open_data(config).train.rows
    plan = [decode(PlanSegment, segment) for segment in progress["data_plan"]]
    noise, sizes = NoiseSource(1), {name: rows.num_rows for name, rows in blocks.items()}
    read = []
    for number, segment in enumerate(plan):
        last = plan[number + 1].first_sample if number + 1 < len(plan) else 128
        shards, indices = SampleOrder(plan[: number + 1], sizes, noise)(np.arange(segment.first_sample, last))
        read += [(segment.blend.names[s], int(i)) for s, i in zip(shards, indices, strict=True)]
    assert len(set(read)) == len(read) == 128
    first = 1
    for steps, processes, micro_batch, workers, both in LEGS:
        positions = range(8 * (first - 1), 8 * steps)
        labels = [blocks[read[p][0]].label[0] + str(read[p][1]) for p in positions[:6]]
        row = (f"{first}-{steps}", processes, micro_batch, workers, 2 if both else 1)
        digest = sum(found[step] for step in range(first, steps + 1)) % 2**63
        record_property("table: samples", (*row, f"{digest:016x}", " ".join(labels) + " ..."))
        first = steps + 1
