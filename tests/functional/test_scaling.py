"""A grid of tiny runs: planned, killed in the middle, resumed, collected; each by one command."""

import csv
import json
import os
import signal
import time

import pytest

from megatron_dlm.checkpointing.layout import CheckpointRoot
from megatron_dlm.scaling.collect import Problem, add_results, collect, find_runs, read_results
from megatron_dlm.scaling.run_list import read_run_list
from megatron_dlm.telemetry.writers import read_metrics
from tests.helpers.processes import TRAINER, Program

RECIPE = """
from pathlib import Path
from dataclasses import replace
from megatron_dlm.families.{family}.objective import {config}
from megatron_dlm.data.loading.data_config import DataConfig
from megatron_dlm.run.config import EvaluationConfig
from megatron_dlm.run.presets import tiny_run

def recipe():
    run = tiny_run({config}(), num_steps=100)
    return replace(
        run,
        data=DataConfig(train=("{corpus.train}",), validation="{corpus.validation}", seq_length=32),
        evaluation=EvaluationConfig(every=1000, num_batches=2, batch_size=8),
    )
"""
SIZES = ("1x16x1", "1x24x1", "1x32x2", "2x24x1", "2x32x2")
OPTIONS = ["--budgets", "4e8", "8e8", "--sizes", *SIZES, "--count", "actual", "--warmup-fraction", "0.1"]
OPTIONS += ["--least-warmup-steps", "2"]


@pytest.fixture(scope="module")
def recipes(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("recipes")
    for family, config in (("ar", "ARConfig"), ("mdlm", "MDLMConfig")):
        text = RECIPE.format(family=family, config=config, corpus=corpus)
        (directory / f"{family}.py").write_text(text)
    return directory


def guess_file(directory, parameters):
    """A fit.json whose laws have one best size for all budgets."""
    laws = [
        {"family": family, "quantity": "parameters", "coefficient": parameters, "exponent": 0.0}
        for family in ("ar", "mdlm", "elbo")
    ]
    path = directory / "guess.json"
    path.write_text(json.dumps({"laws": laws}))
    return path


def plan(command, recipes, output, *more):
    guess = guess_file(recipes, 100_000)
    words = [recipes / "mdlm.py", "--output", output, "--guess", guess]
    return command("scaling", "plan", *words, *OPTIONS, *more).stdout


def refusal(command, *words):
    """What a command that is refused prints."""
    done = command("scaling", *words, check=False)
    assert done.returncode == 2, (done.stdout, done.stderr)
    return done.stderr


@pytest.mark.slow
def test_a_grid_is_planned_killed_resumed_and_collected(command, recipes, tmp_path):
    grid = tmp_path / "grid"
    told = plan(command, recipes, grid)
    assert "10 runs; a budget counts actual FLOPs" in told
    runs = read_run_list(grid).runs
    assert all(0.9 * run.budget_flops < run.actual_flops <= run.budget_flops for run in runs)
    assert len((grid / "commands.txt").read_text().splitlines()) == 10
    queue = Program(*TRAINER, "scaling", "run", grid, "--jobs", 2, together=True)
    deadline = time.monotonic() + 240
    while not any(read_metrics(run.directory) for run in runs[3:]):
        assert queue.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    queue.send_signal(signal.SIGTERM)
    told, _ = queue.communicate(120)
    assert queue.returncode == 3 and "the same command goes on" in told, told
    left = [run for run in runs if not CheckpointRoot(run.directory / "checkpoints").complete()]
    assert left
    told = command("scaling", "run", grid, "--jobs", 2).stdout
    assert "10/10" not in told and "10 rows" in told
    results = read_results(grid / "points.csv")
    assert {result.run for result in results} == {run.name for run in runs}
    by_name = {result.run: result for result in results}
    for run in runs:
        result = by_name[run.name]
        assert result.tokens == run.tokens and result.parameters == run.parameters
        assert result.published_flops == pytest.approx(run.published_flops)
        # Planned from a sample of the first batch.
        assert result.actual_flops == pytest.approx(run.actual_flops, rel=0.1)
        assert 0 < result.nats_per_token < 8 and result.standard_error > 0
    # Without their directories they are still done.
    for run in runs:
        os.rename(run.directory, run.directory.with_name(f"gone-{run.directory.name}"))
    assert "10 of 10 runs are done" in command("scaling", "run", grid).stdout
    assert "10 rows" in command("scaling", "collect", grid, "--output", tmp_path / "again.csv").stdout
    assert read_results(tmp_path / "again.csv") == [by_name[run.name] for run in runs]
    fit = command("scaling", "fit", grid / "points.csv", "--output", tmp_path / "fit.json").stdout
    assert "IsoFLOP optima" in fit
    assert {row["family"] for row in json.loads((tmp_path / "fit.json").read_text())["optima"]} == {"mdlm"}


def test_a_grid_without_two_sizes_on_each_side_is_refused(command, recipes, tmp_path):
    words = [recipes / "ar.py", "--output", tmp_path / "grid", "--guess", guess_file(recipes, 1e9), *OPTIONS]
    told = refusal(command, "plan", *words)
    assert "ar at 4e+08 FLOPs has 5 sizes below the guess of 1e+09 parameters and 0 above" in told
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--budgets", "1e3"), "budgets: 1000 FLOPs pay for 0 steps, not more than the warm-up's 2"),
        (("--budgets", "1e3", "--count", "published"), "budget_flops: 1000.0 does not pay for one step"),
        (("--sizes", "4x128"), "sizes: '4x128' is neither LAYERSxHIDDENxHEADS nor a published size"),
        (("--seeds", "1", "1"), "seeds: one is given twice: 1 1"),
        (("--mfu", "40"), "mfu: 40.0 is outside (0, 1]"),
        (("--guess", "none.json"), "guess: none.json is not a fit.json with laws"),
    ],
)
def test_grids_that_cannot_be_are_refused(command, recipes, tmp_path, more, message):
    words = [
        recipes / "ar.py",
        "--output",
        tmp_path / "grid",
        "--guess",
        guess_file(recipes, 100_000),
        *OPTIONS,
    ]
    assert message in refusal(command, "plan", *words, *more)
    assert not (tmp_path / "grid").exists()


def test_two_recipes_of_one_name_are_refused_and_a_name_helps(command, recipes, tmp_path):
    words = [recipes / "mdlm.py", "--guess", guess_file(recipes, 100_000), *OPTIONS]
    told = refusal(command, "plan", recipes / "mdlm.py", *words, "--output", tmp_path / "a")
    assert "two are called mdlm; name one NAME=FILE" in told
    command("scaling", "plan", f"elbo={recipes / 'mdlm.py'}", *words, "--output", tmp_path / "b")
    assert {run.family for run in read_run_list(tmp_path / "b").runs} == {"elbo", "mdlm"}


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """Writes what a finished run leaves, changed, into a directory of its own."""

    def write(name, change_record=None, change_metrics=None):
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        record = json.loads((uninterrupted[0] / "run.json").read_text())
        entries = read_metrics(uninterrupted[0])
        record["config"]["training"]["seed"] = len(list((tmp_path / "runs").iterdir()))
        record["config"]["model"]["ffn_hidden_size"] = 4 * record["config"]["model"]["hidden_size"]
        (change_record or (lambda _: None))(record)
        entries = (change_metrics or (lambda entries: entries))(entries)
        (directory / "run.json").write_text(json.dumps(record))
        (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return directory

    return write


def test_runs_that_cannot_be_compared_are_named(finished, command, tmp_path):
    """Unfinished, diverged, repeated, of other data or validation: each is left out with its reason."""

    def diverged(entries):
        return [
            entry | ({"nats_per_token": 99.0} if entry["kind"] == "validation" and entry["step"] else {})
            for entry in entries
        ]

    finished("a-good")
    finished("b-good")
    finished("c-unfinished", change_metrics=lambda entries: entries[: len(entries) // 2])
    finished("d-diverged", change_metrics=diverged)
    finished("e-repeated", lambda record: record["config"]["training"].update(seed=1))
    finished("f-other-data", lambda record: record["data"].update(train_sha256="0" * 64))
    finished("g-other-noise", lambda record: record["config"]["evaluation"].update(seed=7))
    finished("i-narrow", lambda record: record["config"]["model"].update(ffn_hidden_size=64))
    (tmp_path / "runs" / "h-broken").mkdir()
    (tmp_path / "runs" / "h-broken" / "run.json").write_text("{")
    results, problems = collect(find_runs([tmp_path / "runs"]))
    assert [result.run for result in results] == ["a-good", "b-good"]
    reasons = {problem.run: problem.reason for problem in problems}
    kinds = ("unfinished", "diverged", "repeated", "other-data", "other-noise", "broken", "narrow")
    assert reasons.keys() == {f"{letter}-{kind}" for letter, kind in zip("cdefghi", kinds, strict=True)}
    assert reasons["c-unfinished"].startswith("unfinished: step")
    assert reasons["d-diverged"].startswith("diverged: 99 nats/token after")
    assert reasons["e-repeated"] == "same family, budget, size, rate and seed as a-good"
    assert "other training data than 4 runs" in reasons["f-other-data"]
    assert "seed 7" in reasons["g-other-noise"]
    done = command("scaling", "collect", tmp_path / "runs", "--output", tmp_path / "points.csv")
    assert "2 rows, 2 of 9 runs here" in done.stdout and done.stderr.count("left out: ") == 7


def test_rows_of_a_table_stay_and_are_replaced_by_name(finished, tmp_path):
    results, _ = collect(find_runs([finished("whole")]))
    table = tmp_path / "points.csv"
    assert add_results(table, results) == results
    assert read_results(table) == results
    assert len(add_results(table, results)) == 1
    # One that is unfinished again, or was found not to be comparable, leaves.
    assert add_results(tmp_path / "other.csv", results, [Problem("whole", "diverged")]) == []
    with table.open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["actual_flops"]) > 0 and len(row["train_sha256"]) == 64
