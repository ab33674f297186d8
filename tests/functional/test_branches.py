"""One long run with a constant learning rate, and branches that decay; evaluation at numbers of FLOPs."""

import shutil

import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.runs import arguments_for, finish, start, train_metrics

WSD = ["--schedule.shape", "wsd", "--schedule.wsd-decay-steps", 4, "--schedule.warmup-steps", 2]


def run(arguments, code=0):
    found, output = finish(start(arguments))
    assert found == code, output
    return output


@pytest.fixture(scope="module")
def trunk(corpus, tmp_path_factory):
    """A run of 14 steps that decays from step 10, with a checkpoint to branch from."""
    directory = tmp_path_factory.mktemp("trunk") / "run"
    options = ["--schedule.decay-steps", 14, "--checkpoint.save-at", 6, "--checkpoint.keep-last", 1]
    run(arguments_for(corpus, directory, *WSD, *options))
    return directory


def tensors(directory, step):
    files = (directory / "checkpoints" / f"step-{step:08d}").glob("*.distcp")
    return {path.name: path.read_bytes() for path in files}


def test_a_branch_ends_as_a_run_from_scratch_of_its_length(corpus, trunk, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trunk, copy)
    # Kept beside the newest.
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000014",
    ]
    options = [*WSD, "--schedule.decay-steps", 14]
    said = run(arguments_for(corpus, copy, *options, "--branch-decay-at", 6))
    assert "continues from step 6 as a branch of" in said and "done: step 10 of 10" in said
    branch = tmp_path / "run-decay-6"
    alone = tmp_path / "alone"
    run(arguments_for(corpus, alone, *WSD, "--schedule.decay-steps", 10, steps=10))
    assert tensors(branch, 10) == tensors(alone, 10)
    whole = train_metrics(alone)
    assert train_metrics(branch) == {step: whole[step] for step in range(7, 11)}
    # Left alone, and done.
    assert "has reached step 10 of 10" in run(arguments_for(corpus, copy, *options, "--branch-decay-at", 6))
    assert train_metrics(copy) == train_metrics(trunk)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--branch-decay-at", 6], "--branch-decay-at: schedule.shape is cosine; a branch takes wsd"),
        ([*WSD, "--branch-decay-at", 97], "it is from step 2 to 96"),
        ([*WSD, "--branch-decay-at", 5], "has no checkpoint of step 5; it has 6, 14"),
        (
            ["--checkpoint.branch-from", "other", "--checkpoint.initialize-from", "other"],
            "checkpoint.branch_from: not together with checkpoint.initialize_from",
        ),
        (["--checkpoint.save-at", 0], "checkpoint.save_at: 0 is below 1"),
        (["--evaluation.at-flops", -1], "evaluation.at_flops: -1.0 is not above 0"),
    ],
)
def test_branches_that_cannot_be_are_refused(corpus, trunk, options, message):
    assert message in run(arguments_for(corpus, trunk, *options), code=2)


def test_a_branch_must_go_further_than_its_start(corpus, trunk, tmp_path):
    options = ["--checkpoint.branch-from", trunk, *WSD]
    said = run(arguments_for(corpus, tmp_path / "short", *options), code=2)
    assert "training.num_steps: 14 is not above step 14 of checkpoint.branch_from" in said


def test_other_seeds_and_data_are_no_branch(corpus, trunk, tmp_path):
    options = ["--checkpoint.branch-from", f"{trunk}@6", *WSD, "--training.seed", 2]
    assert "training.seed: 2 differs from 1" in run(
        arguments_for(corpus, tmp_path / "other", *options), code=2
    )


def test_a_run_is_evaluated_where_it_has_made_so_many_flops(corpus, trunk, tmp_path):
    """Once each, also over a restart, with equal noise: so one run has points at several budgets."""
    flops = {step: entry["training_flops"] for step, entry in train_metrics(trunk).items()}
    marks = [str(flops[3]), str(flops[7] - 1), str(flops[9] + 1)]
    options = [*WSD, "--schedule.decay-steps", 14, "--evaluation.at-flops", *marks]
    directory = tmp_path / "run"
    run(arguments_for(corpus, directory, *options, steps=8))
    run(arguments_for(corpus, directory, *options))
    found = [entry for entry in read_metrics(directory) if entry["kind"] == "validation"]
    # Step 8 was the last of the first part.
    assert [entry["step"] for entry in found] == [0, 3, 7, 8, 10, 14]
    assert [entry["training_flops"] for entry in found[1:]] == [flops[entry["step"]] for entry in found[1:]]
    whole = {entry["step"]: entry for entry in read_metrics(trunk) if entry["kind"] == "validation"}
    assert found[0]["nats_per_token"] == whole[0]["nats_per_token"]
    assert found[-1]["nats_per_token"] == whole[14]["nats_per_token"]
