"""lm-evaluation-harness on local task files, from one command, with a model trained for a few steps."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT
from tests.helpers.runs import arguments_for, finish_ranks
from tests.helpers.selection import slow

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install megatron-dlm[harness]")
STEPS = {"mdlm": 20, "ar": 20, "duo": 80}
"""Until a model tells words from noise."""
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "local_text": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [" the"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "local_long": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [" the"], max_new_tokens: 4096, repetition_penalty: 1.2}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "local_last_word": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "local_perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Task files and their data."""
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "data.jsonl"
    words = ["reads noisy tokens", "zzqx", "predicts clean ones", "while def class"]
    lines = [
        {"question": f"the model {words[i % 2 * 2]} and", "choices": [" predicts", " zzqx;#"], "answer": 0}
        for i in range(6)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (directory / f"{name}.yaml").write_text(f"{head}test_split: test{text}")
    return directory


@pytest.fixture(scope="module", params=["mdlm", slow("ar"), slow("duo")])
def model(request, command, corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    steps = STEPS[request.param]
    words = arguments_for(corpus, directory, recipe=f"examples/{request.param}/tiny.py", steps=steps)
    command(*words)
    return directory / "checkpoints" / f"step-{steps:08d}"


@pytest.mark.slow
def test_local_tasks_end_to_end(command, model, tasks, tmp_path, read_json):
    words = ["evaluate", "harness", model, "--include-path", tasks, "--tasks", *TASKS]
    words += ["--num-times", 4, "--max-copies", 16, "--batch-size", 8]
    home = {"HF_HOME": str(tmp_path / "cache")}
    finished = command(*words, "--output", tmp_path / "results.json", **home)
    for name in TASKS:
        assert name in finished.stdout
    results = read_json(tmp_path / "results.json")
    scores = results["results"]
    # Trained on the words of one choice, and never on the other.
    assert scores["local_choice"]["acc,none"] >= 0.5
    assert 0 < scores["local_perplexity"]["bits_per_byte,none"] < 10
    assert results["notes"] == {
        "local_long": {
            "answers given fewer tokens than the task asks for": 6,
            # Of more than half of the model's 32 tokens.
            "prompts cut on the left to leave room for an answer": 3,
            "texts generated without the task's setting repetition_penalty": 6,
        },
    }
    assert "not answered as asked" in finished.stdout
    assert "local_last_word: an answer counts as greedy if" in finished.stdout
    samples = results["samples"]["local_text"]
    assert len(samples) == 6 and all(" the" not in sample["filtered_resps"][0] for sample in samples)
    again = command(*words, "--output", tmp_path / "again.json", "--batch-size", 3, **home)
    assert again.returncode == 0
    for name in ("local_choice", "local_perplexity"):
        for metric, value in read_json(tmp_path / "again.json")["results"][name].items():
            if isinstance(value, float):
                assert value == pytest.approx(scores[name][metric], rel=1e-4)


@pytest.mark.slow
def test_processes_share_the_questions(model, tasks, tmp_path, monkeypatch, read_json):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    words = ["evaluate", "harness", model, "--include-path", tasks, "--tasks", *TASKS, "--limit", 5]
    words += ["--num-times", 4, "--max-copies", 8, "--batch-size", 8]
    for count in (1, 2):
        code, said = finish_ranks([*words, "--output", tmp_path / f"{count}.json"], count)
        assert code == 0 and said.count("not answered as asked") == 1, said
        assert said.count("answers given fewer tokens than the task asks for") == 2, said
    alone, together = (read_json(tmp_path / f"{count}.json") for count in (1, 2))
    assert alone["notes"] == together["notes"] and alone["greedy_tasks"] == together["greedy_tasks"]
    for name in TASKS:
        texts = [
            [sample["filtered_resps"] for sample in found["samples"][name]] for found in (alone, together)
        ]
        if name in ("local_text", "local_long"):
            assert texts[0] == texts[1]
        assert numbers_of(alone["results"][name]) == pytest.approx(
            numbers_of(together["results"][name]), rel=1e-5
        )


def numbers_of(metrics):
    """Perplexities as logarithms: of a model that knows nothing they magnify a likelihood's last bits."""
    return {
        name: math.log(value) if "perplexity" in name else value
        for name, value in metrics.items()
        if isinstance(value, float)
    }


@pytest.mark.slow
def test_the_registered_name_is_enough(model, tasks):
    """As `lm_eval.simple_evaluate(model="megatron-dlm")` is called from elsewhere."""
    script = f"""
import lm_eval, megatron_dlm.evaluation.lm_eval_model
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    model="megatron-dlm", model_args="path={model},num_times=4,max_copies=4", tasks=["local_choice"],
    task_manager=TaskManager(include_path="{tasks}"), batch_size=8, limit=2)
print("ACC", found["results"]["local_choice"]["acc,none"])
"""
    environment = os.environ | {"HF_HOME": str(tasks / "cache")}
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert finished.returncode == 0 and "ACC" in finished.stdout, finished.stderr


@pytest.mark.slow
def test_lm_eval_s_own_command_line_knows_the_model(model, tasks, tmp_path):
    words = ["--model", "megatron-dlm", "--model_args", f"path={model},num_times=4,max_copies=4"]
    words += ["--tasks", "local_choice,local_long", "--include_path", str(tasks), "--limit", "2"]
    words += ["--output_path", str(tmp_path / "out")]
    program = [sys.executable, "-c", "from megatron_dlm.cli.lm_eval import main; main()", *words]
    environment = os.environ | {"HF_HOME": str(tasks / "cache")}
    finished = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert finished.returncode == 0 and "local_choice" in finished.stdout, finished.stderr
    assert "harness: local_long: 2 answers given fewer tokens" in finished.stderr
    words[words.index(f"path={model},num_times=4,max_copies=4")] = "path=nowhere"
    refused = subprocess.run(
        [*program[:3], *words], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("megatron-dlm-lm-eval: error: model: nowhere: neither")


@pytest.mark.slow
def test_lm_eval_s_own_model_class_takes_an_autoregressive_export(command, corpus, tasks, tmp_path):
    """`--model hf`: texts, likelihoods and choices are those of this package's model class."""
    recipe, run = "examples/ar/tiny.py", tmp_path / "run"
    command(*arguments_for(corpus, run, recipe=recipe, steps=20))
    command("export", run / "checkpoints" / "step-00000020", tmp_path / "folder")
    script = f"""
import lm_eval, megatron_dlm.evaluation.lm_eval_model
from lm_eval.tasks import TaskManager
found = {{}}
for model, given in (("hf", "pretrained={tmp_path}/folder,trust_remote_code=True,dtype=float32"),
                     ("megatron-dlm", "path={tmp_path}/folder")):
    results = lm_eval.simple_evaluate(
        model=model, model_args=given, tasks=["local_choice", "local_text", "local_last_word"], device="cpu",
        task_manager=TaskManager(include_path="{tasks}"), batch_size=2, bootstrap_iters=0)
    found[model] = {{task: [sample["filtered_resps"] for sample in samples]
                    for task, samples in results["samples"].items()}}
print("TEXTS", found["hf"]["local_text"] == found["megatron-dlm"]["local_text"])
for task in ("local_choice", "local_last_word"):
    pairs = [(a, b) for one, two in zip(found["hf"][task], found["megatron-dlm"][task])
             for a, b in zip(one, two)]
    print("NATS", max(abs(a[0] - b[0]) for a, b in pairs))
    print("GREEDY", all(bool(a[1]) == bool(b[1]) for a, b in pairs))
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    print(finished.stdout)
    assert "TEXTS True" in finished.stdout and finished.stdout.count("GREEDY True") == 2
    nats = [float(line.split()[1]) for line in finished.stdout.splitlines() if line.startswith("NATS")]
    assert len(nats) == 2 and max(nats) < 1e-3


@pytest.mark.slow
def test_bad_input_ends_in_one_line(command, model, tasks, tmp_path):
    words = ["evaluate", "harness", model]
    cases = {
        ("--tasks", "no_such_task", "--include-path", tasks): "tasks: no_such_task is not a task",
        ("--tasks", "local_choice", "--include-path", "no"): "include_path: no: no such directory",
        ("--tasks", "local_choice", "--limit", 0): "limit: 0 is below 1",
        ("--tasks", "local_choice", "--confidence", 2): "confidence: 2.0 is outside [0.5, 1]",
    }
    for more, complaint in cases.items():
        finished = command(*words, *more, check=False)
        assert finished.returncode == 2 and complaint in finished.stderr, finished.stderr


@pytest.mark.slow
def test_a_data_set_that_is_not_in_the_cache_is_one_line(model, tmp_path):
    words = ["-m", "megatron_dlm", "evaluate", "harness", str(model), "--tasks", "arc_easy"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    finished = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    last = finished.stderr.splitlines()[-1]
    assert finished.returncode == 2 and "Traceback" not in finished.stderr, finished.stderr
    assert "error: tasks: arc_easy: Couldn't reach 'allenai/ai2_arc'" in last and "HF_HUB_OFFLINE=1" in last
