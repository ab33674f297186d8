"""`megatron-dlm evaluate nll`: one number by every route, of shards and of texts."""

import pytest

from tests.helpers.runs import arguments_for, finish_ranks

SLOW = pytest.mark.slow
STEPS = 3
SIZES = ["--num-sequences", 6, "--num-times", 8]


@pytest.fixture(
    scope="module", params=["mdlm", *(pytest.param(f, marks=SLOW) for f in ("ar", "duo", "esolm"))]
)
def model(request, command, corpus, tmp_path_factory):
    """A checkpoint of 2 x 2 processes and its export."""
    directory = tmp_path_factory.mktemp(request.param)
    layout = ["--parallel.tensor-model-parallel-size", 2, "--parallel.pipeline-model-parallel-size", 2]
    recipe = f"examples/{request.param}/tiny.py"
    words = arguments_for(corpus, directory / "run", *layout, recipe=recipe, steps=STEPS)
    code, output = finish_ranks(words, 4)
    assert code == 0, output
    checkpoint = directory / "run" / "checkpoints" / f"step-{STEPS:08d}"
    command("export", checkpoint, directory / "hf", "--no-verify")
    return request.param, checkpoint, directory / "hf"


def test_one_number_by_every_route(command, model, tmp_path, read_json, record_property):
    """A checkpoint on one, two and four processes, its export, and the export brought back."""
    family, checkpoint, folder = model
    command("import", folder, tmp_path / "back")
    back = tmp_path / "back" / "checkpoints" / checkpoint.name
    layout = ["--parallel.tensor-model-parallel-size", 2, "--parallel.pipeline-model-parallel-size", 2]
    routes = {
        "checkpoint, 1 process": (checkpoint, [], 1),
        "checkpoint, 2 tensor x 2 pipeline": (checkpoint, layout, 4),
        "checkpoint, 2 data, micro-batch 2": (checkpoint, ["--micro-batch-size", 2], 2),
        "export": (folder, ["--micro-batch-size", 3], 1),
        "export, 3 processes": (folder, [], 3),
        "export, imported": (back, [], 1),
    }
    found = {}
    for route, (path, more, processes) in routes.items():
        output = tmp_path / "result.json"
        words = ["evaluate", "nll", path, *SIZES, *more, "--output", output]
        code, printed = finish_ranks(words, processes)
        assert code == 0, printed
        assert "nats/token" in printed and "6/6 sequences" in printed
        found[route] = read_json(output)
        bound = found[route]
        row = (family, route, f"{bound['protocol']['nats_per_token']:.7f}")
        record_property("table: likelihood", (*row, f"{bound['complete']['nats_per_token']:.7f}"))
    first = found["checkpoint, 1 process"]
    for bound in found.values():
        for kind in ("protocol", "complete"):
            assert bound[kind]["nats_per_token"] == pytest.approx(first[kind]["nats_per_token"], rel=1e-5)
            assert bound[kind]["low"] < bound[kind]["nats_per_token"] < bound[kind]["high"]
        assert bound["tokens"] == 6 * 32
    assert (len(first["by_time"]) == 8) == (family != "ar")


@pytest.mark.slow
def test_texts_are_scored_as_the_shard_made_of_them(command, corpus, model, tmp_path, read_json):
    _family, checkpoint, folder = model
    text = corpus.directory / "validation.jsonl"
    for index, (path, words) in enumerate(
        ((checkpoint, ["--text", text]), (folder, ["--text", text]), (folder, ["--data", corpus.validation]))
    ):
        command("evaluate", "nll", path, *words, *SIZES, "--output", tmp_path / f"{index}.json")
    first, second, shard = (read_json(tmp_path / f"{index}.json") for index in range(3))
    assert second == shard
    assert first["protocol"]["nats_per_token"] == pytest.approx(shard["protocol"]["nats_per_token"], rel=1e-5)


def test_the_loss_by_time_is_drawn(command, model, tmp_path):
    family, _checkpoint, folder = model
    picture = tmp_path / "by-time.png"
    finished = command("evaluate", "nll", folder, *SIZES, "--plot", picture, check=False)
    if family == "ar":
        assert finished.returncode == 2 and "plot: ar as configured has no loss by diffusion time" in (
            finished.stderr
        )
        return
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "loss by diffusion time" in finished.stdout and "0.875 to 1.000" in finished.stdout


def test_bad_input_ends_in_one_line(command, corpus, model, tmp_path):
    _family, checkpoint, folder = model
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    run = checkpoint.parents[1]
    cases = {
        ("--num-sequences", 10**6): "num_sequences: 1000000 exceed the",
        ("--data", corpus.validation, "--text", "x"): "data, text: give one of them",
        ("--data", "no/shard"): "no/shard.json: no such file",
        ("--text", "no.txt"): "no.txt: no such file",
        ("--text", tmp_path / "short.jsonl"): f"{tmp_path}/short.jsonl has ",
        ("--step", 3): f"step: 3, and {folder} is not a run's directory",
        ("--output", "no/where.json"): "output: no: no such directory",
        (
            "--parallel.tensor-model-parallel-size",
            2,
        ): "parallel: processes share the copies of an exported folder",
    }
    for words, complaint in cases.items():
        finished = command("evaluate", "nll", folder, *words, check=False)
        assert finished.returncode == 2 and complaint in finished.stderr, finished.stderr
        assert finished.stderr.count("\n") == 1
    finished = command("evaluate", "nll", run, "--step", 77, check=False)
    assert finished.returncode == 2 and f"{run} has no checkpoint of step 77; it has " in finished.stderr
    finished = command("evaluate", "nll", checkpoint, "--dtype", "bf16", check=False)
    assert (
        finished.returncode == 2 and "dtype: a checkpoint is evaluated in the precision of" in finished.stderr
    )
