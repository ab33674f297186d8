"""What a run continues from and what it refuses; the checkpoint command."""

import shutil

import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.runs import (
    arguments_for,
    finish,
    finish_ranks,
    start,
    tensor_files,
    train_metrics,
    without_speed,
)
from tests.helpers.selection import slow


@pytest.mark.parametrize("name", [slow("run.json"), "__0_0.distcp"])
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
    older = directory / "checkpoints" / "step-00000008"
    assert f"--checkpoint.on-corrupt previous goes on from {older}" in output, output
    code, output = finish(start(arguments_for(corpus, directory, "--checkpoint.on-corrupt", "previous")))
    assert code == 0 and f"going back to {directory}/checkpoints/step-00000008" in output, output
    # Set aside: it would be taken for the newest one to keep.
    assert (directory / "checkpoints" / "step-00000012.damaged").is_dir()
    assert min(train_metrics(directory)) == 9
    assert tensor_files(directory) == tensor_files(uninterrupted[0])


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
    assert "  head.weight  float32 [301, 32]\n" in inspected
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


def test_a_run_without_its_checkpoints_says_how_far_it_was(corpus, copied):
    shutil.rmtree(copied / "checkpoints")
    code, output = finish(start(arguments_for(corpus, copied, steps=2)))
    assert code == 0, output
    warning = f"warning: {copied} has metrics up to step 14 and no complete checkpoint; the run begins anew"
    assert output.count(warning) == 1 and "train step 1/2" in output, output


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
    "documents": (["--data.document-mask"], "data.document_mask: True differs from False"),
    "precision": (["--training.precision", "bf16"], "training.precision: bf16 differs from fp32"),
    "loss": (["--objective.loss", "elbo"], "objective.loss: elbo differs from low-variance"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_run_is_not_continued(corpus, copied, name):
    changes, message = REFUSED[name]
    code, output = finish(start(arguments_for(corpus, copied, *changes)))
    assert code == 2 and message in output and len(output.strip().splitlines()) == 1, output


def test_what_is_named_may_change(corpus, copied):
    more = ["--training.seed", 5, "--checkpoint.allow-changed", "training.seed"]
    code, output = finish(start(arguments_for(corpus, copied, *more, steps=16)))
    assert code == 0 and "train step 15/16" in output, output


def test_a_later_version_is_not_continued(corpus, copied):
    manifest = copied / "checkpoints" / "step-00000014" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    code, output = finish(start(arguments_for(corpus, copied)))
    assert code == 2 and "version 2, this program reads 1" in output, output


def test_other_data_is_not_continued(command, corpus, copied, tmp_path):
    from tools import tiny

    text = tiny.write_jsonl(tmp_path / "t.jsonl", tiny.sentences(400, seed=77))
    command("index", "--input", text, "--output", tmp_path / "other", "--tokenizer", corpus.tokenizer)
    code, output = finish(start(arguments_for(corpus, copied, "--data.train", tmp_path / "other")))
    assert code == 2 and "data.train: " in output


def test_another_tokenizer_of_the_same_size_is_refused(command, corpus, copied, tmp_path):
    from tools import tiny

    text = tiny.write_jsonl(tmp_path / "t.jsonl", [s[::-1] for s in tiny.sentences(400, seed=7)])
    command("tokenizer", "train", "--input", text, "--output", tmp_path / "tok", "--vocab-size", 301)
    command("index", "--input", text, "--output", tmp_path / "other", "--tokenizer", tmp_path / "tok")
    more = ["--data.train", tmp_path / "other", "--data.validation", tmp_path / "other"]
    more += ["--checkpoint.initialize-from", copied / "checkpoints" / "step-00000014"]
    code, output = finish(start(arguments_for(corpus, tmp_path / "run", *more)))
    assert code == 2 and "data.tokenizer: " in output


@pytest.mark.slow
def test_a_bf16_run_is_fully_sharded_for_a_while(corpus, tmp_path):
    """From the distributed optimizer and back, evaluations included, as if nothing had been changed."""
    more = ["--training.precision", "bf16", "--evaluation.every", 2]
    sharded = [*more, "--parallel.fully-sharded", "--parallel.no-use-distributed-optimizer"]
    for directory, parts in (("whole", [(12, more)]), ("run", [(4, more), (8, sharded), (12, more)])):
        for steps, options in parts:
            words = arguments_for(corpus, tmp_path / directory, *options, steps=steps)
            code, output = finish_ranks(words, 2)
            assert code == 0, output
    whole, run = (
        {(entry["kind"], entry["step"]): entry["nats_per_token"] for entry in read_metrics(tmp_path / name)}
        for name in ("whole", "run")
    )
    assert len(run) == 12 + 7 and run == pytest.approx(whole, rel=1e-4)


def test_the_record_of_a_run_is_a_recipe(command, copied):
    record = copied / "checkpoints" / "step-00000014" / "run.json"
    out = command("train", record, "--dry-run", 1).stdout
    assert "objective  mdlm" in out and str(copied.parent) not in out


def test_another_family_is_not_continued(corpus, copied):
    code, output = finish(start(arguments_for(corpus, copied, recipe="examples/ar/tiny.py")))
    assert code == 2 and "objective: ARConfig differs from MDLMConfig" in output
    # Not even where asked to.
    assert "allow-changed" not in output


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


def test_a_changing_objective_goes_on_exactly_where_it_was(corpus, tmp_path):
    words = ["--objective.schedules", "block_size 2:1 5:4 9", "largest_time 0:0.5 12"]

    def run(directory, steps):
        recipe = "examples/block-diffusion/tiny.py"
        code, output = finish(start(arguments_for(corpus, directory, *words, recipe=recipe, steps=steps)))
        assert code == 0, output

    run(tmp_path / "whole", 14)
    for steps in (6, 14):
        run(tmp_path / "cut", steps)
    whole, cut = train_metrics(tmp_path / "whole"), train_metrics(tmp_path / "cut")
    assert [whole[step]["schedule/block_size"] for step in (1, 5, 6, 9, 10)] == [1, 1, 4, 4, 16]
    assert whole[4]["schedule/largest_time"] == pytest.approx(0.625)
    for step in range(7, 15):
        assert without_speed(cut[step]) == without_speed(whole[step])
    assert tensor_files(tmp_path / "cut") == tensor_files(tmp_path / "whole")
    code, output = finish(
        start(arguments_for(corpus, tmp_path / "wrong", "--objective.schedules", "block_size 0:5 9"))
    )
    assert code == 2 and "objective.schedules: 'block_size' does not change during training" in output
    assert not (tmp_path / "wrong").exists()
