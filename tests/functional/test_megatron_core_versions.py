"""Layouts, resharding and upstream defects with the newer line of megatron-core, which needs Python 3.12."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.runs import STEPS, arguments_for, train_metrics

EXTRA = "mcore-0.19"
TESTS = ("test_layouts.py", "test_checkpoint.py", "test_upstream_defects.py", "test_fully_sharded.py")

MORE = (
    *(
        f"test_layouts.py::test_layout_equals_one_process[{layout}]"
        for layout in ("2-2-1-2-", "1-2-2-2-overlap,-gather", "2-1-1-8-context-2,-sequence")
    ),
    "test_layouts.py::test_interleaved_stages_equal_one_process[1-2-1-2-interleaved]",
    *(
        f"test_checkpoint.py::test_another_layout_goes_on_with_equal_losses[{pair}]"
        for pair in ("tp2pp2-tp2sp", "overlapping-tp2", "tp2padded-padded")
    ),
)
"""Slow cases, so that each axis is tried with the others."""


def newer_python():
    """A Python that the newer line takes, or None."""
    names = [sys.executable, *filter(None, (shutil.which(f"python3.{minor}") for minor in (12, 13, 14)))]
    # pyenv's names on PATH refuse versions that are installed and not chosen.
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names += [str(path) for path in sorted(versions.glob("3.1[2-4]*/bin/python"))]
    for name in names:
        asked = [name, "-c", "import sys; sys.exit(sys.version_info < (3, 12))"]
        if subprocess.run(asked, capture_output=True).returncode == 0:
            return name
    return None


@pytest.fixture(scope="module")
def newer():
    """Python of an environment with the newer line, made once."""
    python = newer_python()
    if python is None:
        pytest.skip("no Python 3.12 or later on PATH")
    directory = ROOT / f".venv-{EXTRA}"
    own = str(directory / "bin" / "python")
    if not (directory / ".installed").is_file():
        subprocess.run([python, "-m", "venv", str(directory)], check=True)
        words = [own, "-m", "pip", "install", "--quiet", "torch==2.13.0", "-e", f"{ROOT}[{EXTRA},test,hf]"]
        subprocess.run(words, check=True)
        subprocess.run([own, "-m", "pip", "check"], check=True)
        (directory / ".installed").touch()
    asked = "from importlib.metadata import version; print(version('megatron-core'))"
    found = subprocess.check_output([own, "-c", asked], text=True)
    assert found.startswith("0.19."), found
    return own


def ended(python, *words):
    """Run a module and return what it prints."""
    finished = subprocess.run(
        [python, "-W", "ignore", "-m", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_newer_line_trains_and_reshards_as_the_older(newer):
    words = ["pytest", "-q", "-p", "no:cacheprovider", "-n", "2"]
    for names, selection in ((TESTS, ["-m", "not slow"]), (MORE, [])):
        said = ended(newer, *words, *selection, *(f"tests/distributed/{name}" for name in names))
        # With the table of layouts.
        print(said)
        assert " passed" in said and " failed" not in said


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("order", ["newer first", "older first"])
def test_either_goes_on_from_a_checkpoint_of_the_other(newer, corpus, tmp_path, order):
    pythons = [newer, sys.executable] if order == "newer first" else [sys.executable, newer]
    whole = arguments_for(corpus, tmp_path / "whole")
    for steps, python in zip((8, STEPS), pythons, strict=True):
        said = ended(python, "megatron_dlm", *arguments_for(corpus, tmp_path / "run", steps=steps))
    assert "continues from step 8" in said, said
    ended(sys.executable, "megatron_dlm", *whole)
    ours, theirs = train_metrics(tmp_path / "run"), train_metrics(tmp_path / "whole")
    for step in range(9, STEPS + 1):
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)
