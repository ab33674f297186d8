"""`plan` and `doctor` as commands: what they print, write and end with."""

import json
import os
import subprocess
import sys

import pytest

from megatron_dlm.families.registry import OBJECTIVES
from megatron_dlm.platform.codec import encode
from tests.helpers.hang import HANG_SECONDS
from tests.helpers.paths import ROOT
from tests.helpers.runs import finish, start_ranks
from tools import tiny

LARGE = "examples/mdlm/1.7b.py"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe file of a tiny run with data."""
    directory = tmp_path_factory.mktemp("recipe")
    corpus = tiny.make_corpus(directory)
    config = tiny.run_config(corpus, directory / "run", OBJECTIVES["mdlm"]())
    path = directory / "run.json"
    path.write_text(json.dumps({"config": encode(config)}))
    return path


@pytest.fixture
def ended(command):
    """Run a verb that ends with an exit code."""

    def run(code, *words):
        finished = command(*map(str, words), check=False)
        assert finished.returncode == code, finished.stderr + finished.stdout
        return finished

    return run


def test_plan_of_the_large_recipe(ended, tmp_path):
    pytest.importorskip("matplotlib")
    picture, rows = tmp_path / "scaling.png", tmp_path / "plan.json"
    words = ["--nodes", "16", "--gpus-per-node", "8", "--simulate", str(picture), "--output", str(rows)]
    text = ended(0, "plan", LARGE, *words).stdout
    assert "128 h100 on 16 nodes" in text and "the recipe's own layout fits" in text
    assert "options         --" in text and "what another choice costs at best" in text
    assert "assumed: " in text and picture.stat().st_size > 10_000
    written = json.loads(rows.read_text())
    assert len(written) > 300 and {"TP", "GiB", "bytes", "seconds"} <= written[0].keys()


def test_a_layout_that_does_not_fit_is_told_what_to_change(ended):
    options = ["--training.micro-batch-size", "16", "--training.recompute", "none"]
    text = ended(1, "plan", LARGE, "--nodes", "8", *options).stdout
    assert "DOES NOT FIT" in text and "GiB too much" in text
    assert "the nearest layout that fits: --" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "h1000"], "--gpu: 'h1000' is not one of a100-40gb"),
        (["--nodes", "0"], "--nodes: '0' is not a number of nodes"),
        (["--precisions", "bf16,int4"], "--precisions: 'int4' is not one of fp32, bf16, fp8"),
        (["--no.such", "1"], "--no.such"),
    ],
)
def test_bad_words_are_refused(ended, words, says):
    assert says in ended(2, "plan", LARGE, *words).stderr


def test_a_dry_run_tells_memory_time_and_what_is_missing(ended, recipe):
    text = ended(0, "train", LARGE, "--dry-run", "128", "--gpu", "h200").stdout
    assert "GiB of a rank's 133.2 on h200: fits" in text and "predicted for 128 h200" in text
    assert "32,001 ids, assumed" in text and "cannot start it: data: data/nemotron-phase1/train.json" in text
    text = ended(0, "train", recipe, "--dry-run", "2").stdout
    assert "301 ids, of its shards" in text and "has its data and what it starts from" in text


def test_the_doctor_of_a_recipe(ended, recipe):
    found = json.loads(ended(0, "doctor", recipe, "--quick", "--json").stdout)
    assert {"software", "machine", "recipe"} == {finding["topic"] for finding in found}
    assert not [finding for finding in found if finding["status"] == "failed"]
    text = ended(1, "doctor", LARGE, "--quick").stdout
    assert "FAILED start" in text and "data/nemotron-phase1/train.json" in text
    many = ended(1, "doctor", recipe, "--quick", "--processes", "3")
    assert "is not a multiple of" in many.stdout


@pytest.mark.slow
def test_the_launcher_has_the_doctor_look_first(recipe):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GPUS_PER_NODE": "2", "PYTHON": sys.executable}
    words = ["examples/torchrun/train.sh", "--check", str(recipe), "--parallel.device", "cpu"]
    finished = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=HANG_SECONDS
    )
    assert finished.returncode == 0, finished.stderr
    report, _, rest = finished.stdout.partition(" failed\n")
    assert "2 x CPU" in report and report.endswith("notes, 0") and "step 4" in rest


def test_ranks_without_a_device_meet_the_others_and_are_named(recipe):
    own = [["--parallel.device", "cpu"], ["--parallel.device", "cuda"]]
    ranks = start_ranks(["doctor", recipe], 2, own)
    (first, said), (second, _) = (finish(rank) for rank in ranks)
    assert (first, second) == (1, 1), said
    assert "device (rank 1, " in said and "none that can be used on rank 1 on" in said, said
    assert "ok     versions" in said and "all-reduce" not in said, said
