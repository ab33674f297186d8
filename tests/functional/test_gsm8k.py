"""From problems to a score: index, fine-tune, generate, compare; killed and resumed on the way."""

import json
import random
import time

import pytest

from tests.helpers.processes import TRAINER
from tests.helpers.runs import arguments_for, finish, finish_ranks, start_interpreter, start_ranks
from tests.helpers.selection import slow

STEPS = 60
LENGTH = 48


def write_problems(path, count, seed):
    """Sums of two digits."""
    generator = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b = generator.randint(0, 4), generator.randint(0, 4)
        lines.append(json.dumps({"question": f"{a} and {b}?", "answer": f"{a}+{b}\n#### {a + b}"}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(
    scope="module",
    params=["ar", slow("mdlm"), slow("duo"), slow("esolm")],
)
def tuned(request, command, corpus, tmp_path_factory):
    """A tiny model, fine-tuned on sums."""
    directory = tmp_path_factory.mktemp(request.param)
    train = write_problems(directory / "train.jsonl", 200, seed=0)
    data = directory / "data"
    index = ["index", "--input", train, "--output", data, "--tokenizer", corpus.tokenizer]
    index += ["--prompt-key", "question", "--json-keys", "answer"]
    more = ["--data.train", data, "--data.validation", data, "--data.seq-length", LENGTH]
    more += ["--training.num-steps", STEPS, "--schedule.lr", 3e-3]
    run = arguments_for(corpus, directory / "run", *more, recipe=f"examples/{request.param}/tiny.py")
    for words in (index, run):
        command(*words)
    return directory / "run" / "checkpoints" / f"step-{STEPS:08d}"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_problems_are_answered_scored_and_gone_on_with(command, tuned, tmp_path, read_json):
    problems = write_problems(tmp_path / "test.jsonl", 12, seed=1)
    words = ["evaluate", "gsm8k", tuned, "--data", problems]
    whole = command(*words, "--output", tmp_path / "whole", "--batch-size", 12)
    assert "exact match" in whole.stdout and "of 12 problems" in whole.stdout
    assert "12/12 problems" in whole.stderr and "tokens/s" in whole.stderr
    answers = lines_of(tmp_path / "whole" / "answers.jsonl")
    assert [line["number"] for line in answers] == list(range(12))
    for line in answers:
        assert line["correct"] == (line["found"] == line["expected"])
    result = read_json(tmp_path / "whole" / "result.json")
    assert result["unfinished"] == sum(a["unfinished"] for a in answers)
    assert result["problems"] == 12 and result["exact_match"] == sum(a["correct"] for a in answers) / 12
    # Stopped in the middle of a line, and asked in other batches: the same answers.
    part = tmp_path / "part"
    command(*words, "--output", part, "--limit", 5, "--batch-size", 2)
    text = (part / "answers.jsonl").read_bytes()
    (part / "answers.jsonl").write_bytes(text[: len(text) - 20] + "é".encode()[:1])
    resumed = command(*words, "--output", part, "--batch-size", 3)
    assert "8/8 problems" in resumed.stderr
    assert sorted(lines_of(part / "answers.jsonl"), key=lambda line: line["number"]) == answers
    other = command(*words, "--output", part, "--temperature", 0.5, check=False)
    assert other.returncode == 2 and "has answers with sampling" in other.stderr
    with (part / "answers.jsonl").open("a") as file:
        file.write(json.dumps(answers[0]) + "\n")
    twice = command(*words, "--output", part, check=False)
    assert twice.returncode == 2 and "answers.jsonl:13: a second answer to problem 0" in twice.stderr


def test_processes_share_the_problems(tuned, tmp_path):
    problems = write_problems(tmp_path / "test.jsonl", 7, seed=1)
    words = ["evaluate", "gsm8k", tuned, "--data", problems, "--batch-size", 2]
    for count in (1, 2):
        code, said = finish_ranks([*words, "--output", tmp_path / str(count)], count)
        assert code == 0 and said.count("exact match") == said.count("7/7 problems") == 1, said
    for name in ("answers.jsonl", "result.json", "settings.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    # Each finds it, or is told.
    code, said = finish_ranks([*words, "--output", tmp_path / "2", "--seed", 1], 2)
    assert code == 2 and "has answers with seed 0, now 1" in said, said


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_and_loses_no_answer(tuned, tmp_path):
    problems = write_problems(tmp_path / "test.jsonl", 400, seed=1)
    words = ["evaluate", "gsm8k", tuned, "--data", problems, "--batch-size", 2, "--output", tmp_path / "out"]
    ranks = start_ranks(words, 2)
    answers = tmp_path / "out" / "answers.jsonl"
    while not answers.exists() or len(answers.read_text()) < 1000:
        assert ranks[0].poll() is None
        time.sleep(0.1)
    ranks[1].kill()
    code, said = finish(ranks[0])
    ranks[1].communicate()
    assert code == 4 and "error on rank 0: rank 1 is gone or hangs" in said and "Traceback" not in said, said
    done = len(lines_of(answers))
    code, said = finish_ranks(words, 2)
    assert code == 0 and f"{400 - done}/{400 - done} problems" in said, said


@pytest.mark.slow
def test_responses_have_one_likelihood_in_the_checkpoint_and_in_its_export(
    command, tuned, tmp_path, read_json
):
    """Of rows packed with several records that do not see each other, of which responses are scored."""
    command("export", tuned, tmp_path / "folder", "--no-verify")
    for number, model in enumerate((tuned, tmp_path / "folder")):
        words = ["evaluate", "nll", model, "--num-sequences", 6, "--num-times", 8]
        command(*words, "--output", tmp_path / f"{number}.json")
    first, second = (read_json(tmp_path / f"{number}.json") for number in range(2))
    for kind in ("protocol", "complete"):
        assert second[kind]["nats_per_token"] == pytest.approx(first[kind]["nats_per_token"], rel=1e-5)
    assert first["tokens"] == second["tokens"] < 6 * LENGTH


def test_bad_input_ends_in_one_line(command, tuned, tmp_path):
    problems = write_problems(tmp_path / "test.jsonl", 2, seed=1)
    words = ["evaluate", "gsm8k", tuned, "--output", tmp_path / "out", "--data"]
    cases = {
        ("no.jsonl",): "data: no.jsonl",
        (problems, "--template", "Question"): "template: 'Question' does not have {question} just once",
        (problems, "--no-stop-at-eos"): "stop_at_eos: an answer ends with its first <eos>",
        (problems, "--length", 3): "length: 3 tokens leave no answer to problem 0",
        (problems, "--sampler", "nonsense"): "nonsense",
    }
    for more, complaint in cases.items():
        finished = command(*words, *more, check=False)
        assert finished.returncode == 2 and complaint in finished.stderr, finished.stderr
        assert finished.stderr.count("\n") == 1
    # In an interpreter where CUDA does not lead to the CPU.
    words = (*TRAINER, *words, problems, "--device", "cuda:99")
    code, output = finish(start_interpreter(*words))
    assert code == 2 and "device: cuda:99" in output and output.count("\n") == 1, output
    # Nothing of them is kept that a later run would have to agree with.
    assert not (tmp_path / "out").exists()
