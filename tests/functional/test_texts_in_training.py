"""Texts, a judge's perplexity and answers to problems, written by checkpoints while training goes on."""

import json

import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.runs import arguments_for, finish_ranks, tensor_files, train_metrics

STEPS = 14
PROBLEMS = [{"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(5)]


@pytest.fixture(scope="module")
def judge(command, corpus, tmp_path_factory):
    """An AR model."""
    directory = tmp_path_factory.mktemp("judge")
    command(*arguments_for(corpus, directory, recipe="examples/ar/tiny.py", steps=3))
    return directory


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_are_those_of_the_checkpoint_and_training_stays_as_it_is(command, corpus, judge, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    options = ["--generation.every", 8, "--generation.num-samples", 3, "--generation.sampling.num-steps", 4]
    options += ["--generation.batch-size", 2, "--generation.judge", judge]
    options += ["--generation.gsm8k", problems, "--generation.gsm8k-problems", 4]
    code, said = finish_ranks(arguments_for(corpus, tmp_path / "run", *options), 2)
    assert code == 0, said
    assert said.count("texts step 8/14 | unigram entropy") == 1, said
    code, _ = finish_ranks(arguments_for(corpus, tmp_path / "plain"), 2)
    assert code == 0
    assert train_metrics(tmp_path / "run") == train_metrics(tmp_path / "plain")
    assert tensor_files(tmp_path / "run") == tensor_files(tmp_path / "plain")
    (entry,) = [entry for entry in read_metrics(tmp_path / "run") if entry["kind"] == "texts"]
    assert entry["step"] == 8 and entry["generative_perplexity"] > 1 and 0 <= entry["gsm8k_exact_match"] <= 1
    lines = lines_of(tmp_path / "run" / "texts" / "step-00000008.jsonl")
    assert [line["number"] for line in lines] == [0, 1, 2, 0, 1, 2, 3]
    words = ["sample", f"{tmp_path / 'run'}@8", "--num-samples", 3, "--num-steps", 4]
    command(*words, "--output", tmp_path / "sampled.jsonl")
    texts = [line["text"] for line in lines[:3]]
    assert [line["text"] for line in lines_of(tmp_path / "sampled.jsonl")] == texts
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    shown = [
        event.tensor_proto.string_val[0].decode() for event in events.Tensors("texts/text 1/text_summary")
    ]
    assert shown == [texts[1]]


def test_held_out_chats_are_answered(command, corpus, tmp_path):
    """A run that is told the same answer again and again, and is asked for it."""
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}")
    messages = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "the next"}]
    more = [{"role": "user", "content": "what then?"}, {"role": "assistant", "content": "the model"}]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": turns}) + "\n" for turns in [messages + more, messages] * 20)
    )
    words = ["--input", tmp_path / "chats.jsonl", "--chat-key", "messages", "--chat-template", template]
    command("index", *words, "--tokenizer", corpus.tokenizer, "--output", tmp_path / "chats")
    data = ["--data.train", tmp_path / "chats", "--data.validation", tmp_path / "chats"]
    options = [
        *data,
        "--schedule.lr",
        0.02,
        "--schedule.warmup-steps",
        5,
        "--checkpoint.save-every",
        120,
        "--schedule.decay-steps",
        120,
    ]
    options += ["--generation.every", 120, "--generation.records", 3, "--generation.num-samples", 1]
    said = command(
        *arguments_for(corpus, tmp_path / "run", *options, recipe="examples/ar/tiny.py", steps=120)
    )
    assert "tokens of records, which fill" in said.stdout + said.stderr
    (entry,) = [entry for entry in read_metrics(tmp_path / "run") if entry["kind"] == "texts"]
    answers = lines_of(tmp_path / "run" / "texts" / "step-00000120.jsonl")[1:]
    assert [line["expected"] for line in answers] == ["the model\n", "the next\n", "the model\n"]
    assert all(line["correct"] == (line["response"] == line["expected"]) for line in answers)
    assert entry["exact_match"] == sum(line["correct"] for line in answers) / 3 == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--generation.every", 3], "generation.every: 3 is not a multiple of checkpoint.save_every 4"),
        (
            ["--generation.judge", "nowhere"],
            "generation.every: 0, and a judge, problems or records need texts",
        ),
        (
            ["--generation.every", 4, "--generation.judge", "nowhere"],
            "generation.judge: nowhere: neither a model",
        ),
        (["--generation.every", 4, "--generation.gsm8k", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--generation.records", 4], "a judge, problems or records need texts"),
        (["--generation.every", 4, "--generation.records", 4], "have no prompts and responses"),
    ],
)
def test_what_cannot_be_written_ends_the_run_before_its_first_step(command, corpus, tmp_path, options, says):
    finished = command(*arguments_for(corpus, tmp_path / "run", *options), check=False)
    assert finished.returncode == 2 and says in finished.stderr and "Traceback" not in finished.stderr
    assert not (tmp_path / "run" / "checkpoints").exists() or not read_metrics(tmp_path / "run")
