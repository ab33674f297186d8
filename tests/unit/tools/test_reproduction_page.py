"""docs/reproduction.md is what the claims and the results that are there give."""

import json
import shlex
import subprocess
import sys

import pytest

from examples.reproduce import reproduce
from examples.reproduce.claims import CLAIMS, FAMILIES, in_json, speed_at
from megatron_dlm.run.config import load_recipe
from tests.helpers.paths import ROOT
from tools import reproduction_page


def test_the_page_is_current():
    assert reproduction_page.PAGE.read_text() == reproduction_page.page(), (
        "python tools/reproduction_page.py writes it again"
    )


def test_results_are_shown_beside_what_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction_page, "RESULTS", tmp_path)
    claim = next(claim for claim in CLAIMS if claim.name == "gsm8k")
    found = dict.fromkeys((published.label for published in claim.values), None) | {"AR": 62.0, "Duo": 50.0}
    (tmp_path / "gsm8k.json").write_text(
        json.dumps({"date": "2026-01-02", "hours": 7.5, "from_command": 1, "found": found})
    )
    text = reproduction_page.page()
    assert "| AR | 62.9 | 2.0 | 62.0 |" in text and "| Duo | 65.8 | 2.0 | 50.0, differs |" in text
    assert "| MDLM | 58.8 | 2.0 | not run |" in text and "Run on 2026-01-02 in 7.5 hours." in text


def test_numbers_are_found_where_the_commands_leave_them(tmp_path):
    optima = [
        {"family": f, "budget_flops": b, "nats_per_token": n}
        for f, b, n in (("ar", 1e18, 3.0), ("duo", 1e18, 4.0))
    ]
    (tmp_path / "fit.json").write_text(json.dumps({"optima": optima}))
    read = in_json("fit.json", "optima", "nats_per_token", family="duo", budget_flops=1e18)
    assert read(tmp_path) == 4.0
    with pytest.raises(StopIteration):
        in_json("fit.json", "optima", "nats_per_token", family="mdlm")(tmp_path)
    (tmp_path / "speed-quality").mkdir()
    rows = ["family,generative_perplexity,tokens_per_second", "duo,100,10", "duo,400,160", "mdlm,100,1"]
    (tmp_path / "speed-quality" / "pareto.csv").write_text("\n".join(rows) + "\n")
    assert speed_at(200, "duo")(tmp_path) == pytest.approx(40)
    with pytest.raises(ValueError):
        speed_at(200, "mdlm")(tmp_path)


def test_an_empty_directory_has_no_numbers(tmp_path):
    for claim in CLAIMS:
        assert all(number is None for number in reproduce.read(claim, tmp_path).values())
        assert len({published.label for published in claim.values}) == len(claim.values) > 0


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_full_size_commands_name_what_is_there(claim):
    for command in claim.commands:
        words = shlex.split(command)
        for word in words:
            path = word.rpartition("=")[2]
            assert not path.startswith("examples/") or (ROOT / path).is_file(), command
        if "scaling plan" in command:
            recipes = [ROOT / word.rpartition("=")[2] for word in words if word.endswith(".py")]
            objectives = [load_recipe(path).objective for path in recipes]
            assert all(objectives.count(objective) == 1 for objective in objectives), command
    told = subprocess.run(
        [sys.executable, reproduce.__file__, claim.name, "--print"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.splitlines() == list(claim.commands)


def test_bad_words_are_refused():
    for words, says in (
        (["none"], "invalid choice"),
        (["gsm8k", "--from-command", "99"], "is outside [1, 16]"),
    ):
        told = subprocess.run([sys.executable, reproduce.__file__, *words], capture_output=True, text=True)
        assert told.returncode == 2 and says in told.stderr


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_scaled_down_commands_run(claim, tmp_path_factory):
    """From data to a result, each claim by its own commands; later ones use what is there."""
    work = tmp_path_factory.getbasetemp() / "reproduce"
    words = [sys.executable, reproduce.__file__, claim.name, "--small", "--work", work]
    told = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    found = json.loads((work / "results" / f"{claim.name}.json").read_text())["found"]
    if claim.name in ("gsm8k", "zero-shot"):
        assert all(number is not None for number in found.values())
    if claim.name == "isoflop":
        optima = json.loads((work / "isoflop" / "fit.json").read_text())["optima"]
        assert {optimum["family"] for optimum in optima} == set(FAMILIES)
