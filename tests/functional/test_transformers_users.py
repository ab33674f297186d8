"""Exports in the hands of users of transformers, accelerate and peft; what these save comes back."""

import os
import shutil
import subprocess
import sys
from functools import lru_cache

import pytest

from megatron_dlm.families.registry import OBJECTIVES
from tests.helpers.paths import ROOT
from tests.helpers.runs import arguments_for
from tests.helpers.transformers_environments import PEFT, environment_with

SLOW = pytest.mark.slow
STEPS = 4


@pytest.fixture(scope="module")
def exported(command, corpus, tmp_path_factory):
    """An export of a family, trained for a few steps."""

    @lru_cache
    def export(family):
        directory = tmp_path_factory.mktemp(family)
        command(*arguments_for(corpus, directory / "run", recipe=f"examples/{family}/tiny.py", steps=STEPS))
        command("export", directory / "run" / "checkpoints" / f"step-{STEPS:08d}", directory / "folder")
        return directory / "folder"

    return export


def use(folder, out, python=sys.executable):
    """Run the program that uses a folder, from elsewhere and without this checkout on the path."""
    program = ROOT / "tests" / "helpers" / "transformers_user.py"
    environment = os.environ | {"HF_MODULES_CACHE": str(out / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    out.mkdir()
    finished = subprocess.run(
        [str(python), "-B", str(program), str(folder), str(out)],
        capture_output=True,
        text=True,
        cwd=out,
        stdin=subprocess.DEVNULL,
        env=environment,
        timeout=400,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_an_autoregressive_export_is_a_causal_language_model(exported, command, tmp_path):
    assert "ar: all as expected" in use(exported("ar"), tmp_path / "out")
    comes_back(command, tmp_path / "out" / "again", tmp_path)


@SLOW
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", PEFT)
@pytest.mark.parametrize("family", OBJECTIVES)
def test_every_family_in_every_version(exported, command, tmp_path, family, version, record_property):
    said = use(exported(family), tmp_path / "out", environment_with(version))
    assert f"{family}: all as expected" in said and "without" not in said
    for name in ("again", "merged"):
        comes_back(command, tmp_path / "out" / name, tmp_path)
    record_property("table: transformers", (family, version))


def comes_back(command, folder, scratch):
    """By sampling and importing it; without the run's record, a recipe has to say how it was trained."""
    command("sample", folder, "--num-samples", 1, "--length", 8)
    command("import", folder, scratch / f"imported-{folder.name}")
    bare = scratch / f"bare-{folder.name}"
    shutil.copytree(folder, bare)
    record = bare / "megatron_dlm_run.json"
    recipe = scratch / f"{folder.name}.json"
    record.rename(recipe)
    (bare / "export_report.json").unlink()
    command("sample", bare, "--num-samples", 1, "--length", 8)
    refused = command("import", bare, scratch / "x", check=False)
    assert refused.returncode == 2 and "has no megatron_dlm_run.json" in refused.stderr
    command("import", bare, scratch / f"imported-bare-{folder.name}", "--recipe", recipe)
