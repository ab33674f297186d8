"""The small-scale study: each document once, recipes that differ in the objective only, its last commands."""

import csv
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dlm.run.config import load_recipe
from tests.helpers.paths import ROOT

STUDY = ROOT / "examples" / "small-scale-study"
OBJECTIVES = ("ar", "mdlm", "mdlm_elbo", "duo", "esolm")


def wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def make_corpus(wheels, output):
    words = [sys.executable, str(STUDY / "corpus.py"), str(wheels), str(output)]
    return subprocess.run(words, capture_output=True, text=True)


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_each_document_is_there_once_and_held_out_ones_apart(tmp_path):
    documents = {f"a/{n}.py": f"# {n}\n" + "pass\n" * 60 for n in range(300)}
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels" / "a.whl", documents | {"a/short.py": "pass", "a/data.json": "1" * 500})
    wheel(tmp_path / "wheels" / "b.whl", {"b/copy.py": documents["a/7.py"], "b/own.md": "Own text. " * 50})
    told = make_corpus(tmp_path / "wheels", tmp_path / "text")
    assert told.returncode == 0, told.stderr
    train, held_out = (texts_of(tmp_path / "text" / f"{part}.jsonl") for part in ("train", "held-out"))
    assert sorted(train + held_out) == sorted({*documents.values(), "Own text. " * 50})
    assert 0 < len(held_out) < 20
    # Again, and with one package less, a document stays on its side.
    (tmp_path / "wheels" / "b.whl").unlink()
    make_corpus(tmp_path / "wheels", tmp_path / "again")
    assert set(texts_of(tmp_path / "again" / "held-out.jsonl")) <= set(held_out)


def test_no_wheels_are_said(tmp_path):
    told = make_corpus(tmp_path, tmp_path / "text")
    assert told.returncode == 1 and "no wheels" in told.stderr


@pytest.mark.parametrize("name", OBJECTIVES)
def test_recipes_differ_in_their_objective_only(name):
    base, recipe = (load_recipe(STUDY / f"{each}.py") for each in ("base", name))
    assert replace(recipe, objective=base.objective) == base
    assert recipe.objective.name == name.split("_")[0]


def test_the_script_names_files_that_exist():
    script = (STUDY / "study.sh").read_text()
    for name in (*(f"{each}.py" for each in OBJECTIVES), "corpus.py", "packages.txt"):
        assert f"$here/{name}" in script and (STUDY / name).is_file(), name
    pinned = [line for line in (STUDY / "packages.txt").read_text().splitlines() if not line.startswith("#")]
    assert pinned == sorted(pinned) and all("==" in line for line in pinned)


def test_arithmetic_is_right_and_no_numbers_are_in_two_files(tmp_path):
    arithmetic = runpy.run_path(str(STUDY / "arithmetic.py"))
    subprocess.run(
        [sys.executable, str(STUDY / "arithmetic.py"), str(tmp_path)], check=True, capture_output=True
    )
    ways, questions = {}, {}
    for name, count in arithmetic["COUNTS"].items():
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == count and len({row["question"] for row in rows}) == count
        assert all(arithmetic["is_right"](row["answer"]) for row in rows)
        questions[name] = {row["question"] for row in rows}
        ways[name] = {tuple(re.findall(r"<<(.*?)=", row["answer"])) for row in rows}
        # Every kind is there: sums, differences, products, and both in turn.
        signs = {tuple(re.findall(r"[-+*]", "".join(way))) for way in ways[name]}
        assert signs == {("+",), ("-",), ("*",), ("*", "+")}
    for one, other in itertools.combinations(ways, 2):
        assert not ways[one] & ways[other] and not questions[one] & questions[other]
    assert not arithmetic["is_right"]("3 + 4 = <<3+4=8>>8\n#### 8")
    assert not arithmetic["is_right"]("3 + 4 = <<3+4=7>>7\n#### 8")


@pytest.mark.slow
def test_the_best_models_are_sampled_fine_tuned_and_scored(tmp_path):
    def ended(*words):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        told = subprocess.run(
            [sys.executable, *map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert told.returncode == 0, told.stdout + told.stderr
        return told.stdout

    work = Path("runs/small-scale-study")
    here, text, data = tmp_path / work, work / "text", work / "data"
    ended(STUDY / "arithmetic.py", work / "arithmetic")
    for directory in (text, data):
        (tmp_path / directory).mkdir()
    for part in ("train", "held-out"):
        problems = [
            json.loads(line) for line in (here / "arithmetic" / f"{part}.jsonl").read_text().splitlines()
        ]
        rows = [json.dumps({"text": f"{row['question']} {row['answer']}"}) for row in problems]
        (tmp_path / text / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    dlm = ("-m", "megatron_dlm")
    ended(
        *dlm,
        "tokenizer",
        "train",
        "--vocab-size",
        512,
        *("--input", text / "held-out.jsonl", "--output", work / "tokenizer"),
    )
    for part in ("train", "held-out"):
        places = ("--input", text / f"{part}.jsonl", "--output", data / part)
        ended(*dlm, "index", *places, "--tokenizer", work / "tokenizer")
    recipes = [STUDY / f"{name}.py" for name in ("ar", "mdlm", "duo", "esolm")]
    size = ("--sizes", "1x16x1", "--sizes-per-budget", "1", "--budgets", "5e9", "--least-warmup-steps", "5")
    ended(*dlm, "scaling", "plan", *recipes, "--output", work / "grid", *size)
    ended(*dlm, "scaling", "run", work / "grid")
    shutil.copy(here / "grid" / "points.csv", here / "points.csv")
    few = ("--num-samples", 2, "--fine-tuning-steps", 4, "--problems", 2)
    assert ended(STUDY / "best_models.py", work, *few).endswith("scores.csv\n")
    with (here / "arithmetic" / "scores.csv").open() as file:
        scores = {row["family"]: row for row in csv.DictReader(file)}
    assert list(scores) == ["ar", "mdlm", "duo", "esolm"]
    for row in scores.values():
        assert row["problems"] == "2" and 0 <= float(row["low"]) <= float(row["high"]) <= 1
        assert 0 < float(row["fine_tuned_nats_per_token"]) < 8
    with (here / "sampling" / "pareto.csv").open() as file:
        assert [row["num_steps"] for row in csv.DictReader(file)] == 2 * ["4", "8", "16", "32", "64", "128"]
