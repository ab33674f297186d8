"""A run with mask and uniform noise, the whole way: trained, resumed, scored, sampled, exported and back."""

import json

import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.runs import STEPS, arguments_for, finish_ranks, tensor_files, train_metrics

RECIPE = "examples/mask-uniform/tiny.py"
TENSOR = ("--parallel.tensor-model-parallel-size", 2)
SIZES = ("--num-sequences", 4, "--num-times", 4)


@pytest.fixture(scope="module")
def whole(command, corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("mask-uniform") / "whole"
    command(*arguments_for(corpus, directory, recipe=RECIPE))
    return directory


@pytest.fixture(scope="module")
def checkpoint(whole):
    return whole / "checkpoints" / f"step-{STEPS:08d}"


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(command, corpus, whole, tmp_path):
    for steps in (8, STEPS):
        command(*arguments_for(corpus, tmp_path, recipe=RECIPE, steps=steps))
    assert train_metrics(tmp_path) == train_metrics(whole)
    assert tensor_files(tmp_path) == tensor_files(whole)


def test_tensor_parallel_ranks_compute_what_one_does(corpus, whole, tmp_path):
    code, output = finish_ranks(arguments_for(corpus, tmp_path, *TENSOR, recipe=RECIPE, steps=6), 2)
    assert code == 0, output
    alone, parallel = (
        {e["step"]: e["nats_per_token"] for e in read_metrics(d) if e["kind"] == "train" and e["step"] <= 6}
        for d in (whole, tmp_path)
    )
    assert len(parallel) == 6 and parallel == pytest.approx(alone, rel=2e-5)


@pytest.mark.slow
def test_it_is_exported_scored_sampled_and_imported(command, checkpoint, tmp_path, read_json):
    folder = tmp_path / "folder"
    command("export", checkpoint, folder)
    report = read_json(folder / "export_report.json")
    assert report["passed"] and report["family"] == "mask-uniform"
    assert report["greedy_trace"]["equal_tokens"] == report["greedy_trace"]["compared_tokens"] > 0
    command("import", folder, tmp_path / "back")
    found = {}
    for name, model in (
        ("checkpoint", checkpoint),
        ("folder", folder),
        ("imported", tmp_path / "back" / "checkpoints" / checkpoint.name),
    ):
        command("evaluate", "nll", model, *SIZES, "--output", tmp_path / f"{name}.json")
        found[name] = read_json(tmp_path / f"{name}.json")["complete"]["nats_per_token"]
    assert found == pytest.approx(dict.fromkeys(found, found["checkpoint"]), rel=1e-5)
    texts = tmp_path / "texts.jsonl"
    words = ("--num-samples", 2, "--num-steps", 5, "--trace", tmp_path / "trace.html", "--output", texts)
    command("sample", folder, *words, "--prompt", "the model")
    lines = [json.loads(line) for line in texts.read_text().splitlines()]
    assert len(lines) == 2 and all(line["text"].startswith("the model") for line in lines)
    assert (tmp_path / "trace.html").stat().st_size > 5_000


@pytest.mark.slow
def test_the_harness_asks_it(command, checkpoint, tmp_path, read_json):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install megatron-dlm[harness]")
    data = tmp_path / "data.jsonl"
    line = {"question": "the model reads", "choices": [" noisy tokens", " zzqx;#"], "answer": 0}
    data.write_text(f"{json.dumps(line)}\n" * 3)
    (tmp_path / "choice.yaml").write_text(
        f"task: local_choice_of_two\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: answer\ndoc_to_choice: '{{choices}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    words = ("--include-path", tmp_path, "--tasks", "local_choice_of_two", "--num-times", 4)
    home = {"HF_HOME": str(tmp_path / "cache")}
    command("evaluate", "harness", checkpoint, *words, "--output", tmp_path / "results.json", **home)
    assert 0 <= read_json(tmp_path / "results.json")["results"]["local_choice_of_two"]["acc,none"] <= 1
