"""Saves, loader processes and their like with the oldest and the newest torch that setup.py takes.

What a library does in a child of ours, and whether that touches a GPU, changes from release to release.
"""

import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

FLOOR = "2.10.0"
VERSIONS = {"floor": f"torch=={FLOOR}", "newest": "torch"}


def environment_with(name):
    """A virtual environment of its own; its torch brings CUDA's libraries, some gigabytes."""
    directory = ROOT / f".venv-torch-{name}"
    python = directory / "bin" / "python"
    if not (directory / ".installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        words = [str(python), "-m", "pip", "install", "--quiet", VERSIONS[name], "-e", f"{ROOT}[test]"]
        subprocess.run(words, check=True)
        (directory / ".installed").touch()
    return python


def test_the_floor_is_what_setup_says():
    assert f'"torch>={FLOOR}a0"' in (ROOT / "setup.py").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", VERSIONS)
def test_children_with_another_torch(name):
    python = environment_with(name)
    version = [str(python), "-c", "import torch; print(torch.__version__)"]
    found = subprocess.check_output(version, text=True).strip()
    assert found.startswith(FLOOR) == (name == "floor")
    words = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/distributed/test_children.py",
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
    print(found, finished.stdout.splitlines()[-1])
