"""`megatron-dlm evaluate gate`: emulated FP8 against bf16 at equal data and noise."""

import numpy as np
import pytest

from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.runs import arguments_for, finish_ranks

SIZES = ("--num-sequences", 8, "--num-times", 8)
STEPS = 210


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory, command):
    """The same run in bf16 and in two FP8 recipes."""
    directory = tmp_path_factory.mktemp("gate")
    few = ("--checkpoint.save-every", 1000, "--optimizer.epsilon", 1e-3)
    for name, precision in {
        "bf16": ("bf16",),
        "fp8": ("fp8", "--fp8.recipe", "blockwise"),
        "other": ("bf16", "--training.seed", 2),
    }.items():
        words = ("--training.precision", *precision, *few)
        steps = 4 if name == "other" else STEPS
        command(*arguments_for(corpus, directory / name, *words, recipe="examples/mdlm/tiny.py", steps=steps))
    return directory


@pytest.mark.slow
def test_two_trainings(command, runs, tmp_path, read_json):
    words = ("evaluate", "gate", runs / "bf16", runs / "fp8", *SIZES)
    files = ("--output", tmp_path / "gate.json", "--plot", tmp_path / "gate.png")
    printed = command(*words, "--tolerance", 0.2, *files).stdout
    for word in ("(bf16)", "(fp8) less A", "training from step 106 on", "by diffusion time", "passed"):
        assert word in printed
    found = read_json(tmp_path / "gate.json")
    assert found["passed"] and len(found["by_time"]) == 8
    assert found["difference"]["low"] < found["difference"]["nats_per_token"] < found["difference"]["high"]
    # Something was rounded, and it did not matter much.
    assert 0 < abs(found["difference"]["nats_per_token"]) < 0.2
    assert (tmp_path / "gate.png").read_bytes().startswith(b"\x89PNG")
    # The difference is that of both runs' own bounds on the same noise, and its bands' mean.
    of_each = []
    for name in ("bf16", "fp8"):
        (checkpoint,) = (runs / name / "checkpoints").iterdir()
        command("evaluate", "nll", checkpoint, *SIZES, "--output", tmp_path / f"{name}.json")
        of_each.append(read_json(tmp_path / f"{name}.json")["protocol"]["nats_per_token"])
    expected = pytest.approx(of_each[1] - of_each[0], rel=1e-3)
    assert found["difference"]["nats_per_token"] == expected
    assert np.mean([band["nats_per_token"] for band in found["by_time"]]) == expected
    # Of training: the second half of the logged steps, with Student's interval of ten blocks' means.
    a, b = (
        {
            entry["step"]: entry["nats_per_token"]
            for entry in read_metrics(runs / name)
            if entry["kind"] == "train"
        }
        for name in ("bf16", "fp8")
    )
    differences = np.array([b[step] - a[step] for step in range(106, STEPS + 1)])
    training = found["training"]["difference"]
    assert training["nats_per_token"] == pytest.approx(differences.mean(), rel=1e-9)
    means = [block.mean() for block in np.array_split(differences, 10)]
    half = 2.2622 * np.std(means, ddof=1) / 10**0.5
    assert training["high"] - training["low"] == pytest.approx(2 * half, rel=1e-4)
    strict = command(*words, "--tolerance", 0, check=False)
    assert strict.returncode == (0 if found["difference"]["high"] <= 0 else 1)


@pytest.mark.slow
def test_one_checkpoint_at_two_precisions(command, runs, tmp_path, read_json):
    """Against itself the difference is nothing at all, and in FP8 far below the bound's own uncertainty."""
    words = ("evaluate", "gate", runs / "bf16", runs / "bf16", *SIZES, "--output", tmp_path / "gate.json")
    command(*words, "--tolerance", 0)
    assert read_json(tmp_path / "gate.json")["difference"]["nats_per_token"] == 0.0
    for recipe in ("tensorwise", "mxfp8"):
        command(*words, "--precision-b", "fp8", "--fp8.recipe", recipe, "--tolerance", 1)
        found = read_json(tmp_path / "gate.json")
        width = found["a"]["high"] - found["a"]["low"]
        assert 0 < abs(found["difference"]["nats_per_token"]) < width / 5
        assert found["training"] is None
    layout = ("--parallel.tensor-model-parallel-size", 2)
    code, printed = finish_ranks([*words, *layout, "--precision-b", "fp32", "--tolerance", 1], 2)
    assert code == 0 and printed.count("passed") == 1, printed


@pytest.mark.slow
def test_what_cannot_be_compared(command, runs, tmp_path):
    for words, message in (
        ((runs / "bf16", tmp_path), "not a complete checkpoint"),
        ((runs / "bf16", runs / "other"), "4 logged steps in common, up to 4"),
        ((runs / "bf16", runs / "fp8", "--tolerance", -1), "tolerance: -1.0 is not 0 or above"),
        ((runs / "bf16", runs / "fp8", "--micro-batch-size", 0), "micro_batch_size: 0 is below 1"),
        ((runs / "bf16", runs / "fp8", "--output", tmp_path / "no" / "x"), "no such directory"),
    ):
        finished = command("evaluate", "gate", *words, check=False)
        assert finished.returncode == 2 and message in finished.stderr, finished.stderr
        assert len(finished.stderr.splitlines()) == 1
