"""Runs over blends: a changed one is refused unless named, and then goes on without repeating a sample."""

import json

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.runs import arguments_for, finish, start


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
